"""CLIP's byte-pair encoding without torch gives open_clip's ids."""

from __future__ import annotations

import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer

from kdscale.core.types import WeightsError
from kdscale.models.bpe import build_bpe, clean, openai_merges
from kdscale.models.preprocess import MINI_BPE

ODD = [
    "Rock &amp;amp; roll",
    "It’s 2019’s “best” café — l'été naïve",
    "  tabs\tand\nnew\r\nlines \x1b[31mred\x1b[0m bell\x07 ",
    "I'LL we'RE they'Ve don´t 123 456abc ﬁne ﬂower ½ İstanbul straße",
    "a" * 500,
    "",
    "👩‍👩‍👧 日本語の写真 العربية",
    "schön mojibake: sch\u00c3\u00b6n &lt;b&gt;bold&lt;/b&gt; <b>tag</b>",
]


def texts() -> list[str]:
    letters = [chr(c) for c in range(32, 0x3000) if unicodedata.category(chr(c))[0] in "LNPSZM"]
    drawn = random.Random(0)
    mixed = ["".join(drawn.choices(letters, k=drawn.randint(1, 40))) for _ in range(2000)]
    ascii_ = ["".join(map(chr, drawn.choices(range(32, 127), k=60))) for _ in range(2000)]
    return ODD + mixed + ascii_


@pytest.mark.parametrize(("merges", "length"), [(None, 77), (None, 8), (MINI_BPE, 32)])
def test_ids_are_open_clips(merges: Path | None, length: int) -> None:
    path = merges or openai_merges()
    theirs = SimpleTokenizer(bpe_path=str(path), context_length=length)(texts()).numpy()
    ours = build_bpe(path, length)(texts())
    assert ours.dtype == np.int64
    assert np.array_equal(ours, theirs)


def test_a_caption_cannot_spell_a_special_token() -> None:
    (ids,) = build_bpe(openai_merges(), 77)(["<end_of_text> and more"])
    assert list(ids).count(49407) == 1


def test_plain_text_is_not_repaired() -> None:
    assert clean("A  Photo of\ta Cat") == "a photo of a cat"


def test_it_needs_no_torch() -> None:
    program = (
        "import sys; from kdscale.models.bpe import *; build_bpe(openai_merges(), 77)(['a'])"
        "; print('torch' in sys.modules, 'open_clip' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert found.stdout.decode().split() == ["False", "False"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(b"no gzip")
    with pytest.raises(WeightsError, match="not a gzipped merges file"):
        build_bpe(path, 77)
