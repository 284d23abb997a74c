"""Make glosses.tsv and LICENSE.wordnet from WordNet 3.0's data.noun (Debian package wordnet-base).

    python examples/data/make_glosses.py /usr/share/wordnet/data.noun

Line format of data.noun: wndb(5WN); the numbers of the 26 noun classes: lexnames(5WN).
"""

import random
import sys
from pathlib import Path

CLASSES = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive "
    "object person phenomenon plant possession process quantity relation shape state substance time"
).split()
KEPT = "animal artifact body communication food location person plant substance time".split()
FIRST_NUMBER = 3  # lexicographer file of noun.Tops
MAX_CHARACTERS = 64
TEST, TRAIN = 2000, 6000

here = Path(__file__).parent
lines = Path(sys.argv[1]).read_text(encoding="utf8").splitlines()
notice = [line[4:].rstrip() for line in lines if line.startswith("  ")]  # after the line number

rows: dict[str, tuple[str, str]] = {}
for line in lines[len(notice) :]:
    fields, _, text = line.partition("|")
    gloss = text.split(';  "')[0].split('; "')[0].strip(" ;")
    if gloss and len(gloss) <= MAX_CHARACTERS:
        rows.setdefault(gloss.lower(), (CLASSES[int(fields.split()[1]) - FIRST_NUMBER], gloss))

chosen = random.Random(0).sample([row for row in rows.values() if row[0] in KEPT], TEST + TRAIN)
with open(here / "glosses.tsv", "w", encoding="utf8") as file:
    for i, (label, gloss) in enumerate(chosen):
        file.write(f"{'test' if i < TEST else 'train'}\t{label}\t{gloss}\n")
(here / "LICENSE.wordnet").write_text("\n".join(notice) + "\n", encoding="utf8")
