"""A stand-in for flash-attn on the CPU: what maefast calls, as releases 2.8 and 4.0 demand it."""

from pathlib import Path

COMMON = """
import torch

def checked(*tensors):
    for t in tensors:
        assert t.dtype in (torch.bfloat16, torch.float16), t.dtype
        assert t.stride(-1) == 1 and all(stride * t.itemsize % 16 == 0 for stride in t.stride()[:-1]), t.stride()
        assert torch.compiler.is_compiling() or t.storage_offset() * t.itemsize % 16 == 0

@torch.autocast("cpu", enabled=False)
def probabilities(q, k):
    scores = torch.einsum("nmhd,nthd->nhmt", q.float(), k.float()) * q.shape[-1] ** -0.5
    return scores.softmax(-1), scores.logsumexp(-1)

@torch.autocast("cpu", enabled=False)
def plain(q, k, v):
    return torch.einsum("nhmt,nthd->nmhd", probabilities(q, k)[0], v.float()).to(q.dtype).contiguous()
"""

RELEASE_2 = """
from .common import checked, plain

def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                              alibi_slopes=None, deterministic=False, return_attn_probs=False):
    N, T, three, h, d = qkv.shape
    assert three == 3 and softmax_scale is None and not causal and deterministic
    checked(qkv)
    return plain(*qkv.unbind(2))

def flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                             alibi_slopes=None, deterministic=False, return_attn_probs=False):
    N, T, two, h, d = kv.shape
    assert two == 2 and q.shape[2:] == (h, d) and softmax_scale is None and not causal and deterministic
    checked(q, kv)
    return plain(q, *kv.unbind(2))
"""

RELEASE_4 = """
import torch
from ..common import checked, plain, probabilities

def _flash_attn_fwd(q, k, v, *, softmax_scale=None, causal=False, return_lse=False):
    checked(q, k, v)
    assert return_lse
    return plain(q, k, v), probabilities(q, k)[1], None, None, None

@torch.autocast("cpu", enabled=False)
def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, deterministic=False):
    checked(q, k, v, out, dout)
    assert deterministic and lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.dtype == torch.float32
    p, again = probabilities(q, k)
    assert torch.equal(lse, again)
    dp = torch.einsum("nmhd,nthd->nhmt", dout.float(), v.float())
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    ds = p * (dp - delta[..., None]) * q.shape[-1] ** -0.5
    dq = torch.einsum("nhmt,nthd->nmhd", ds, k.float()).to(q.dtype).contiguous()
    dk = torch.einsum("nhmt,nmhd->nthd", ds, q.float()).to(k.dtype).contiguous()
    return dq, dk, torch.einsum("nhmt,nmhd->nthd", p, dout.float()).to(v.dtype).contiguous()
"""


def write_flash_attn(folder: Path, release: int) -> None:
    """Write a package flash_attn below `folder`, laid out as that release is."""
    package = folder / "flash_attn"
    package.mkdir(parents=True)
    (package / "common.py").write_text(COMMON)
    if release == 2:
        (package / "flash_attn_interface.py").write_text(RELEASE_2)
        (package / "__init__.py").write_text("from .flash_attn_interface import *\n")
    else:  # a namespace package, as its wheel makes one
        (package / "cute").mkdir()
        (package / "cute" / "__init__.py").write_text("")
        (package / "cute" / "interface.py").write_text(RELEASE_4)
