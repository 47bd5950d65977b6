"""Device, number format and allocator."""

import contextlib
import ctypes
import sys

import torch

# Imported by `DistributedDataParallel` anyway, but late. It binds the process group that exists by then into default
# arguments, so that the group could never be closed: see `processes.close_process_group`.
import torch.distributed.nn


def pick_device() -> torch.device:
    """CUDA, then Apple MPS, then CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Type for autocast in which the hardware is faster than in fp32, or None where fp32 is the right choice.

    bf16 on CUDA from Ampere on, and on CPUs with AMX, Arm BF16 or AMD's AVX512-BF16; fp16 on older CUDA; fp32 on MPS
    and other CPUs, where bf16 is emulated.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        # `torch.autocast` is no witness: it computes bf16 on every CPU, by emulation where it has to.
        has = torch.cpu.get_capabilities().get
        # AVX512-BF16 doubles the rate of products on AMD. On an Intel Xeon without AMX they reached 0.64 of the rate in
        # fp32, and a training step took 1.5 times as long.
        fast_avx512 = has("avx512_bf16") and not str(has("cpu_name")).startswith("Intel")
        return torch.bfloat16 if has("amx_bf16") or has("bf16") or fast_avx512 else None
    return None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast context for `dtype`; with None everything stays as it is."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks: returning them to the kernel costs a CPU training step a quarter in page faults.

    Every activation of a step is such a block, is zeroed by the kernel page by page when it comes back, and is of the
    size of the last step's. Other systems and C libraries stay as they are.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            m_trim_threshold, m_mmap_max = -1, -4  # parameter numbers from glibc's malloc.h
            libc.mallopt(m_mmap_max, 0)  # large blocks come from the heap too, where they can be kept
            libc.mallopt(m_trim_threshold, 2**31 - 1)  # never shrink the heap; a C int
