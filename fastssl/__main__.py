from fastssl.cli import command

command()
