"""Weights that are no numbers are found by their bits, in every dtype that an adapter may have."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lora_dpo.adapters.peft_files import check_finite
from lora_dpo.errors import AdapterError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def saved(folder, *values, dtype):
    tensors = {"first": torch.zeros(3, 2), "second": torch.tensor([[0.5, *values]], dtype=torch.float64)}
    path = folder / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in tensors.items()}, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused_by_name(value, dtype, tmp_path):
    saved(tmp_path, value, dtype=dtype)
    with pytest.raises(AdapterError, match=r"holds NaN or infinite weights \(in second\)"):
        check_finite(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_smallest_numbers_are_numbers(dtype, tmp_path):
    range_ = torch.finfo(dtype)
    saved(tmp_path, range_.max, range_.min, range_.tiny, range_.smallest_normal / 4, 0.0, -0.0, dtype=dtype)
    check_finite(tmp_path)


@pytest.mark.parametrize("left", [4, 40, -3, -2])
def test_a_file_that_is_cut_while_it_is_read_is_no_traceback(left, tmp_path):
    path = saved(tmp_path, 1.0, dtype=torch.bfloat16)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(AdapterError, match=r"written to while it was read|no whole safetensors file"):
        check_finite(tmp_path)


def test_it_needs_no_torch(tmp_path):
    saved(tmp_path, 1.0, dtype=torch.float16)
    code = (
        "import sys; from pathlib import Path; from lora_dpo.adapters.peft_files import check_finite; "
        f"check_finite(Path({str(tmp_path)!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
