from bklm.harness import cli
from bklm.studies.grad_blend import GradBlendConfig

cli.main(GradBlendConfig)
