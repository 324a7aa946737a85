from bklm.harness import cli
from bklm.studies.physics import PhysicsConfig

cli.main(PhysicsConfig)
