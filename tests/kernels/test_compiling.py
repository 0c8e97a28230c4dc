"""Every Triton kernel compiles for every kind of card, without one: Triton needs none to compile."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from llmrecipes.kernels import float8, four_bit, quantize, rotary, rowwise, scaled_matmul, short_attention

BF16, F32, I8, F8, I32, U8 = "*bf16", "*fp32", "*i8", "*fp8e4nv", "*i32", "*u8"
TURNED = {"largest": 127.0, "integer": True, "pieces": 64, "size": 172, "block": 256}
WHOLE = {**TURNED, "pieces": 1, "size": 11008, "block": 16384}
FOUR_BIT = {"block": 64, "scale_block": 256, "nested": True}
PARTS = (U8, F32, U8, F32, F32, F32)
ATTENTION = {"shared": 2, "size": 128, "tile": 64}
STRIDES = ("i32",) * 6
MATMUL = {"piece": scaled_matmul.PIECE, "adds": True, "integer": True, "up_rank_stride": 1}
SMALL = {**MATMUL, "descriptors": False, "tile_m": 128, "tile_n": 128, "tile_k": 64}
HOPPER = {**MATMUL, "descriptors": True, "tile_m": 128, "tile_n": 256, "tile_k": 128}
TILES = ("tensordesc<i8[128, 128]>", "tensordesc<i8[256, 128]>")

KERNELS: dict[str, tuple[Any, tuple[str, ...], dict[str, Any]]] = {
    "quantize": (quantize._quantize, (BF16, F32, I8, F32, "i32"), {"multiplies": False, **TURNED}),
    "quantize, with factors": (
        quantize._quantize, (BF16, F32, F8, F32, "i32"),
        {"multiplies": True, **WHOLE, "largest": 448.0, "integer": False},
    ),
    "norm": (
        rowwise._rms_norm,
        (BF16, BF16, BF16, I8, F32, "i32", "i32", "fp32"),
        {"quantizes": True, **TURNED},
    ),
    "norm backward": (
        rowwise._rms_norm_backward, (BF16, BF16, BF16, BF16, BF16, "i32", "i32", "fp32"), {"block": 4096}
    ),
    "swiglu": (rowwise._swiglu, (BF16, BF16, I8, F32, "i32", "i32"), {"quantizes": True, "part": 4096, **TURNED}),
    "swiglu backward": (
        rowwise._swiglu_backward,
        (BF16, BF16, BF16, BF16, I8, F32, "i32", "i32", "i32", "i32"),
        {"quantizes": True, "part": 4096, "size": 11008, "largest": 127.0, "integer": True},
    ),
    "dropout": (rowwise._drop, (BF16, BF16, "i32", "i32", "fp32", "i32"), {"block": 1024}),
    "rotate": (
        rotary._rotate,
        (BF16, BF16, BF16, "i32", "i32", "i32"),
        {"heads": 40, "half": 64, "padded_heads": 64, "padded_half": 64},
    ),
    "rotate back": (
        rotary._rotate_back,
        (BF16, BF16, BF16, BF16, I8, F32, BF16, BF16, *("i32",) * 8),
        {
            "heads": 32, "key_heads": 8, "half": 64, "padded_heads": 32, "padded_key_heads": 8, "padded_half": 64,
            "quantizes": True, "width": 6144, "part": 4096, "largest": 127.0, "integer": True,
        },
    ),
    "expand": (
        four_bit._expand, (*PARTS, BF16, F32, "i32", "i32"),
        {**FOUR_BIT, "width": 11008, "scaled": False, "integer": False, "held": 32},
    ),
    "expand in fp8": (
        four_bit._expand, (*PARTS, F8, F32, "i32", "i32"),
        {**FOUR_BIT, "width": 11008, "scaled": True, "integer": False, "held": 32},
    ),
    "expand transposed, blocks over rows": (
        four_bit._expand_columns, (*PARTS, "*i32", F32, "i32", "i32", "i32"),
        {**FOUR_BIT, "integer": False, "aligned": False, "fours": 16, "pairs": 32},
    ),
    "expand in 8 bits": (
        four_bit._expand_turned,
        (*PARTS, "*i16", F32, "i32", "i32"),
        {**FOUR_BIT, "pieces": 64, "half": 86, "pairs": 32},
    ),
    "expand transposed": (
        four_bit._expand_columns,
        (*PARTS, "*i32", F32, "i32", "i32", "i32"),
        {**FOUR_BIT, "integer": True, "aligned": True, "fours": 16, "pairs": 32},
    ),
    "expand fp8": (
        float8._expand_rows, (U8, F32, BF16, BF16, "i32"), {"scaled": False, "pieces": 1, "size": 11008, "block": 16384}
    ),
    "expand fp8 to int8": (
        float8._expand_rows, (U8, F32, I8, F32, "i32"), {"scaled": True, "pieces": 64, "size": 172, "block": 256}
    ),
    "expand fp8 to int8, transposed": (
        float8._expand_columns, (U8, F32, I8, F32, "i32", "i32", "i32"), {"height": 128, "across": 64}
    ),
    "matmul": (
        scaled_matmul._scaled_matmul,
        (I8, I8, BF16, F32, F32, BF16, BF16, BF16, *("i32",) * 6, "i32"),
        SMALL,
    ),
    "matmul on Hopper": (
        scaled_matmul._scaled_matmul,
        (*TILES, BF16, F32, F32, BF16, BF16, BF16, *("i32",) * 6, "i32"),
        HOPPER,
    ),
    "attention": (short_attention._forward, (BF16, BF16, BF16, BF16, F32, I32, "i32", *STRIDES, "fp32"), ATTENTION),
    "attention by queries": (
        short_attention._query_gradient,
        (BF16, BF16, BF16, BF16, BF16, F32, F32, BF16, I32, "i32", *STRIDES, "fp32"),
        ATTENTION,
    ),
    "attention by keys": (
        short_attention._key_gradient,
        (BF16, BF16, BF16, BF16, F32, F32, BF16, BF16, I32, "i32", *STRIDES, "fp32", "i32"),
        ATTENTION,
    ),
}  # fmt: skip

WARPS = {
    "quantize": 8,
    "quantize, with factors": 8,
    "expand": 1,
    "expand in 8 bits": 1,
    "expand transposed": 1,
    "expand transposed, blocks over rows": 1,
    "expand in fp8": 1,
    "expand fp8": 8,
    "expand fp8 to int8": 8,
    "norm": 8,
    "swiglu": 8,
    "swiglu backward": 16,
    "rotate back": 8,
    "matmul": 8,
    "matmul on Hopper": 8,
}
"""Where it is not 4: as many as the functions ask for."""

SHARED_MEMORY = {89: 99 << 10, 90: 227 << 10}
"""Bytes that a program may have: CUDA C++ Programming Guide, compute capabilities."""


def shared_bytes(name: str, capability: int) -> int:
    """Compiles a kernel; returns the shared memory that a program of it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants = KERNELS[name]
    names = [argument for argument in kernel.arg_names if argument not in constants]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": WARPS.get(name, 4), "num_stages": 3 if "matmul" in name else 2}
    return int(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared)


def kernels_for(capability: int) -> list[str]:
    """The kernels that such a card runs."""
    return [name for name in KERNELS if capability == 90 or "Hopper" not in name]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_all_compile_and_fit(capability: int) -> None:
    pytest.importorskip("triton")
    # In a process of its own: here the kernels are defined for the interpreter.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, __file__, str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert list(found) == kernels_for(capability)
    assert all(taken <= SHARED_MEMORY[capability] for taken in found.values()), found


if __name__ == "__main__":
    print(json.dumps({name: shared_bytes(name, int(sys.argv[1])) for name in kernels_for(int(sys.argv[1]))}))
