"""Many notebooks with many parameter sets: ``python -m bklm.batch SETS.yaml --workers 2``.

``bklm.batch.plan`` reads and checks the YAML file, ``bklm.batch.run`` runs what it describes. Nothing is imported here: the
process of each notebook would import it too.
"""
