"""A kernel that writes where nothing is: after it the CUDA context of this process is lost. `python -m tests.gpu.cuda_fault BACK_END`."""

from __future__ import annotations

import ctypes
import sys

from models.engines.device_memory import open_device_memory

PTX = b""".version 6.4
.target sm_50
.address_size 64
.visible .entry fault() {
    .reg .b64 %address; .reg .b32 %value;
    mov.u64 %address, 64; mov.u32 %value, 1;
    st.global.u32 [%address], %value;
    ret;
}
"""


def fault(back_end: str) -> None:
    """Raises DeviceLost."""
    memory = open_device_memory(back_end)
    driver = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), PTX) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"fault") == 0
    one, none, stream = ctypes.c_uint(1), ctypes.c_uint(0), ctypes.c_void_p(memory.stream)
    assert driver.cuLaunchKernel(function, one, one, one, one, one, one, none, stream, None, None) == 0
    memory.synchronize()


if __name__ == "__main__":
    try:
        fault(sys.argv[1])
    except Exception:  # noqa: BLE001  # the point: it must be none
        sys.exit("taken for the fault of one request")
