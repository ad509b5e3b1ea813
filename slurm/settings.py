"""
Reads the file of flags for sweep.sbatch: `python slurm/settings.py FILE` prints each line of flags, quoted for a shell.
Quotes and comments in the file are the same as in a shell, but nothing is expanded or executed.
"""

import re
import shlex
import sys


def read_settings(path):
    """
    Reads a file of flags, one setting per line, without comments and empty lines.
    Inputs:
        path - Path of the file, which may come from any editor and operating system.
    Outputs:
        settings - List with a list of words for each setting.
    Raises:
        ValueError - if a line is invalid, or no line has flags.
        OSError - if the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"  # PowerShell writes UTF-16
    if b"\0" in data and encoding != "utf-16":
        raise ValueError(f"{path} is not a text file: save it as UTF-8")
    settings = []
    for number, line in enumerate(re.split("\r\n|\n|\r", data.decode(encoding, "surrogateescape")), 1):
        try:  # shlex also begins comments within words
            words = shlex.split(re.sub(r"(?<=\S)#", "\0", line), comments=True)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        settings.append([word.replace("\0", "#") for word in words])
    settings = [words for words in settings if words]
    if not settings:
        raise ValueError(f"{path} contains no settings")
    return settings


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: python slurm/settings.py FILE")
    try:
        settings = read_settings(sys.argv[1])
    except (OSError, ValueError) as error:
        sys.exit(f"error: SETTINGS is invalid: {error}")
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    for words in settings:
        print(shlex.join(words))


if __name__ == "__main__":
    main()
