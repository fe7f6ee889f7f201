from fastssl.start import command

command()
