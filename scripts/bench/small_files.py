#!/usr/bin/env python3
"""usage: small_files.py OUTPUT [--flat]: a tar archive of 120,000 small files, always the same; half of them in one directory, or all."""

import io
import random
import sys
import tarfile

FILES = 120_000


def main() -> None:
    rng = random.Random(1)
    noise = rng.randbytes(1 << 20)
    flat = FILES if "--flat" in sys.argv[2:] else FILES // 2
    with tarfile.open(sys.argv[1], "w", format=tarfile.GNU_FORMAT) as archive:

        def add(name: str, kind: bytes, size: int) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mtime = kind, size, 1_700_000_000
            info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
            start = rng.randrange(len(noise) - size)
            archive.addfile(info, io.BytesIO(noise[start : start + size]))

        add("flat", tarfile.DIRTYPE, 0)
        for number in range(flat):
            add(f"flat/file-{number:06}", tarfile.REGTYPE, rng.randrange(1, 4000))
        for number in range(FILES - flat):
            if number % 100 == 0:
                add(f"dir-{number // 100:03}", tarfile.DIRTYPE, 0)
            add(f"dir-{number // 100:03}/file-{number:06}", tarfile.REGTYPE, rng.randrange(1, 4000))


main()
