"""Cards by name: memory and speed as their makers publish them. Nothing here was measured.

What a product in 16 bits with sums in float32 runs at, dense ("TFLOP/s"), is in NVIDIA's data sheets of cards for
servers and workstations. Of GeForce cards it stands in the white papers of the architectures, for some cards; all of
them have CUDA cores and a boost clock on NVIDIA's pages of comparison, and the one follows from the other:

    TFLOP/s = 2 · cores · boost clock · (4 for Turing, 2 for Ampere, Ada and Blackwell)

since a core's multiply-add counts 2, and tensor cores of GeForce cards sum in float32 at so many times the cores' rate.
`tests/training/test_cards.py` holds the rule against each white paper's own numbers. Of a laptop's card NVIDIA names a
range of boost clocks, and its maker chooses: the lowest stands here. GB/s are the makers', or follow from the published
width and speed of the memory.

Sources: NVIDIA's "compare GeForce graphics cards" and "compare GeForce laptops" (GB, cores, clocks); its white papers
on Turing, GA102, Ada and Blackwell; its data sheets of T4, V100, A10, A100, L4, L40S, H100, H200 and the RTX A series;
A10G: AWS on G5 instances. AMD's pages of the RX 7900 series.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lora_dpo.errors import ConfigError
from lora_dpo.text import shown

GB = 1 << 30
"""As cards and memory are sold: a 12 GB card has 12 · 2^30 bytes."""


@dataclass(frozen=True)
class Card:
    """One card, as it is sold."""

    name: str
    gigabytes: float
    bandwidth: float
    """GB/s (of 10^9 bytes) between the card and its memory."""
    tflops: float
    """10^12 FLOP/s of dense products in 16 bits, sums in float32."""
    dtype: str
    """What these 16 bits are: bfloat16, or float16 before Ampere."""
    kind: str
    """geforce, workstation, server, or amd."""
    ecc: bool = False
    """Error correction is on as the card comes, and takes a sixteenth of its memory."""

    @property
    def memory(self) -> int:
        """Bytes that programs see."""
        return int(self.gigabytes * GB * (15 / 16 if self.ecc else 1))


_TURING = """
RTX 2060           6   336   1920  1680
RTX 2060 12GB     12   336   2176  1650
RTX 2060 Super     8   448   2176  1650
RTX 2070           8   448   2304  1620
RTX 2070 Super     8   448   2560  1770
RTX 2080           8   448   2944  1710
RTX 2080 Super     8   496   3072  1815
RTX 2080 Ti       11   616   4352  1545
"""
"""Name, GB, GB/s, CUDA cores, boost clock in MHz."""

_AMPERE = """
RTX 3050 6GB       6   168   2304  1470
RTX 3050           8   224   2560  1777
RTX 3060 8GB       8   240   3584  1777
RTX 3060          12   360   3584  1777
RTX 3060 Ti        8   448   4864  1665
RTX 3070           8   448   5888  1725
RTX 3070 Ti        8   608   6144  1770
RTX 3080          10   760   8704  1710
RTX 3080 12GB     12   912   8960  1710
RTX 3080 Ti       12   912  10240  1665
RTX 3090          24   936  10496  1695
RTX 3090 Ti       24  1008  10752  1860
RTX 3060 Laptop    6   336   3840  1283
RTX 3070 Laptop    8   448   5120  1290
RTX 3080 Laptop        8   448   6144  1245
RTX 3080 Laptop 16GB  16   448   6144  1245
RTX 3080 Ti Laptop    16   512   7424  1125
"""

_ADA = """
RTX 4060           8   272   3072  2460
RTX 4060 Ti        8   288   4352  2535
RTX 4060 Ti 16GB  16   288   4352  2535
RTX 4070          12   504   5888  2475
RTX 4070 Super    12   504   7168  2475
RTX 4070 Ti       12   504   7680  2610
RTX 4070 Ti Super 16   672   8448  2610
RTX 4080          16   717   9728  2505
RTX 4080 Super    16   736  10240  2550
RTX 4090          24  1008  16384  2520
RTX 4050 Laptop    6   192   2560  1605
RTX 4060 Laptop    8   256   3072  1470
RTX 4070 Laptop    8   256   4608  1230
RTX 4080 Laptop   12   432   7424  1350
RTX 4090 Laptop   16   576   9728  1455
"""

_BLACKWELL = """
RTX 5050           8   320   2560  2570
RTX 5060           8   448   3840  2500
RTX 5060 Ti        8   448   4608  2570
RTX 5060 Ti 16GB  16   448   4608  2570
RTX 5070          12   672   6144  2510
RTX 5070 Ti       16   896   8960  2450
RTX 5080          16   960  10752  2620
RTX 5090          32  1792  21760  2410
RTX 5060 Laptop    8   384   3328  1455
RTX 5070 Laptop    8   384   4608  1425
RTX 5070 Ti Laptop 12  672   5888  1447
RTX 5080 Laptop   16   896   7680  1500
RTX 5090 Laptop   24   896  10496  1597
"""

_OTHERS = """
RTX A2000 12GB    12   288   31.9  bfloat16  workstation
RTX A4000         16   448   76.7  bfloat16  workstation
RTX A5000         24   768  111.1  bfloat16  workstation
RTX A6000         48   768  154.8  bfloat16  workstation
RTX 6000 Ada      48   960  364.2  bfloat16  workstation
T4                16   320   65.0  float16   server ecc
V100 16GB         16   900  125.0  float16   server
V100 32GB         32   900  125.0  float16   server
A10               24   600  125.0  bfloat16  server ecc
A10G              24   600   70.0  bfloat16  server ecc
L4                24   300  121.0  bfloat16  server ecc
L40S              48   864  362.0  bfloat16  server ecc
A100 40GB         40  1555  312.0  bfloat16  server
A100 80GB         80  1935  312.0  bfloat16  server
H100 PCIe         80  2000  756.0  bfloat16  server
H100 SXM          80  3350  989.0  bfloat16  server
H200             141  4800  989.0  bfloat16  server
RX 7900 XT        20   800  103.0  bfloat16  amd
RX 7900 XTX       24   960  122.8  bfloat16  amd
"""
"""Name, GB, GB/s, TFLOP/s, what its 16 bits are, kind."""


def _geforce(table: str, dtype: str, rate: int) -> Iterator[Card]:
    for line in table.strip().splitlines():
        name, gigabytes, bandwidth, cores, clock = line.rsplit(maxsplit=4)
        tflops = 2 * int(cores) * int(clock) * 1e6 * rate / 1e12
        yield Card(name.strip(), float(gigabytes), float(bandwidth), round(tflops, 1), dtype, "geforce")


def _others(table: str) -> Iterator[Card]:
    for line in table.strip().splitlines():
        name, gigabytes, bandwidth, tflops, dtype, kind, ecc = re.fullmatch(  # type: ignore[union-attr]
            r"(.+?)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+(\w+)\s+(\w+)( ecc)?", line
        ).groups()
        yield Card(name, float(gigabytes), float(bandwidth), float(tflops), dtype, kind, ecc=bool(ecc))


CARDS: tuple[Card, ...] = (
    *_geforce(_TURING, "float16", 4),
    *_geforce(_AMPERE, "bfloat16", 2),
    *_geforce(_ADA, "bfloat16", 2),
    *_geforce(_BLACKWELL, "bfloat16", 2),
    *_others(_OTHERS),
)
"""The cards that are known by name; those of a generation from the slowest on, laptops apart."""

_NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|radeon|amd|rtx|gtx|rx|generation|graphics|card|gpu|hbm\d?e?|gddr\d\w?|[^a-z0-9]"
)
_FORM = re.compile(r"\b(pcie|sxm)\d?\b")
"""What tells cards of one chip apart, beside their memory; may be left out."""


@dataclass(frozen=True)
class _Called:
    """What a name says."""

    chip: str
    form: str | None
    gigabytes: float | None

    @classmethod
    def read(cls, text: str) -> _Called:
        """`NVIDIA GeForce RTX 4060 Ti 16GB` is `4060ti` with 16 GB."""
        text = re.sub(r"\b(mobile|notebook)\b", "laptop", text.lower())
        memory, form = re.search(r"\b(\d+)\s*gi?b\b", text), _FORM.search(text)
        for part in (memory, form):
            text = text.replace(part[0], " ") if part else text
        return cls(_NOISE.sub("", text), form[1] if form else None, float(memory[1]) if memory else None)


def find_cards(text: str) -> tuple[Card, ...]:
    """The cards that a name means, the one that is planned for first: `RTX 4090`, `3060`, `4060 Ti 16GB`, `a100`.

    A name that several share means the card that is called just that, else the one with the least memory.
    """
    asked = _Called.read(text)
    found = []
    for card in CARDS:
        called = _Called.read(card.name)
        same = asked.chip == called.chip and asked.gigabytes in (None, card.gigabytes)
        if same and (asked.form is None or called.form in (None, asked.form)):
            found.append((called.gigabytes is not None, card.gigabytes, card))
    return tuple(card for *_, card in sorted(found, key=lambda one: one[:2]))


def unknown_card(text: str) -> ConfigError:
    """What to say of a name that is none, with the nearest ones: those of the same number first."""
    names = {_Called.read(card.name).chip: re.sub(r" \d+GB$", "", card.name) for card in CARDS}
    chip = _Called.read(text).chip
    number = re.match(r"\d{4}", chip)
    same = [other for other in names if number and other.startswith(number[0])]
    close = difflib.get_close_matches(chip, list(names), n=3, cutoff=0.7)
    near = list(dict.fromkeys(names[other] for other in (*same, *close)))[:3]
    hint = f" The nearest: {', '.join(near)}." if near else ""
    return ConfigError(
        f"--card is {shown(text)}: no card of that name is known here.{hint} lora-dpo plan --cards lists them; for any "
        "other NVIDIA card write its memory, such as --card 12GB."
    )
