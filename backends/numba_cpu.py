"""FlashAttention-2 on the CPU, jitted by numba: float32, tiled, vectorised and parallel."""

from __future__ import annotations

import contextlib
import importlib.util
import threading

import torch

from flash2.core.contract import FEATURES, Backend, Capability, Spec

# numba's work-sharing runtimes end the process when two Python threads enter them at once.
_launching = threading.Lock()


class NumbaCPU(Backend):
    """Register-tiled FlashAttention-2 (Dao 2023) in float32, forward and backward, on every CPU core torch uses."""

    name = "numba"
    opaque = True
    capability = Capability(
        devices=("cpu",),
        precisions={"fp32": ("ieee",)},
        features=frozenset(FEATURES),
        kernels=r"^numba",  # no torch operator is called so: any matmul or attention of torch is a fallback
    )

    def unavailable(self):
        """Says how to get numba if it is not installed."""
        if importlib.util.find_spec("numba") is None:
            return 'numba is not installed; pip install "flash2-triton[numba]"'
        return None

    def version(self):
        """numba's version."""
        import numba

        return f"numba {numba.__version__}"

    def scratch_bytes(self, problem):
        """The copies of dq that a backward sums up; the tiles of the threads are small beside any operand."""
        if problem.pass_ == "fwd":
            return 0
        copies = key_splits(problem.batch * problem.heads_kv, problem.seq_kv)
        return 4 * copies * problem.batch * problem.heads_q * problem.seq_q * (problem.head_dim + 31)

    def forward(self, q, k, v, spec):
        """(o, lse), both contiguous."""
        from flash2.backends import numba_kernels as kernels

        sizes, band, slopes = arguments(q, k, spec)
        q, k, v = (x.detach().contiguous() for x in (q, k, v))
        o, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        with launch() as threads:
            scratch = q.new_empty(threads * kernels.forward_floats(sizes[5]))
            counter = q.new_zeros(1, dtype=torch.int64)
            kernels.forward(
                threads, flat(scratch), flat(counter), flat(q), flat(k), flat(v),
                flat(o), flat(lse), flat(slopes), sizes, band, spec.scale, spec.softcap,
            )  # fmt: skip
        return o, lse

    def backward(self, do, q, k, v, o, lse, spec):
        """(dq, dk, dv), contiguous; see scratch_bytes for what it takes beyond them."""
        from flash2.backends import numba_kernels as kernels

        sizes, band, slopes = arguments(q, k, spec)
        do, q, k, v, o, lse = (x.detach().contiguous() for x in (do, q, k, v, o, lse))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        batch, heads_q, heads_kv, seq_q, seq_kv, head_dim = sizes
        splits, width = key_splits(batch * heads_kv, seq_kv), kernels.wide(head_dim)
        sums = dq if (splits, width) == (1, head_dim) else q.new_empty(splits * batch * heads_q * seq_q * width)
        with launch() as threads:
            scratch = q.new_empty(threads * kernels.backward_floats(sizes))
            counter = q.new_zeros(1 + batch * heads_kv, dtype=torch.int64)
            kernels.backward(
                threads, flat(scratch), flat(counter), splits, flat(do), flat(q), flat(k), flat(v), flat(o), flat(lse),
                flat(sums), flat(dq), flat(dk), flat(dv), flat(slopes), sizes, band, spec.scale, spec.softcap,
            )  # fmt: skip
        return dq, dk, dv


def key_splits(heads, seq_kv):
    """Into how many backward tasks the keys of a head are cut.

    Enough for 8 threads if that leaves a tile of 128 keys each, and for 32 if it leaves 512: below that the copies of
    dq cost more than they bring. Never by the number of threads: the cut decides the order of the sums in dq.
    """
    return max(1, min(-(-8 // heads), -(-seq_kv // 128)), min(-(-32 // heads), seq_kv // 512))


def arguments(q, k, spec: Spec):
    """(sizes, band, slopes) as the kernels take them: tuples of integers, and one slope per (batch, query head)."""
    from flash2.backends.numba_kernels import OPEN

    left, right = spec.band
    band = (OPEN if left is None else min(left, OPEN), OPEN if right is None else min(right, OPEN))
    slopes = q.new_empty(0)
    if spec.alibi_slopes is not None:
        slopes = spec.alibi_slopes.expand(q.shape[0], q.shape[1]).contiguous()
    return (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]), band, slopes


def flat(x):
    """A contiguous tensor as a flat numpy array on the same memory."""
    return x.view(-1).numpy()


@contextlib.contextmanager
def launch():
    """The number of threads, torch's, that numba will use inside; one Python thread at a time."""
    import numba

    with _launching:
        before = numba.get_num_threads()
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(threads)
        try:
            yield threads
        finally:
            numba.set_num_threads(before)
