from bklm.command.main import start

start()
