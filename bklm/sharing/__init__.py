"""Work that several machines share through a database. Imports nothing else of bklm."""
