"""At which rank the right answer stands: what classification and retrieval have in common.

Shape suffixes: Q queries, R queries of a portion, C candidates, U distinct ones, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kdscale.core.types import DataError, TrainingDiverged

MAX_CELLS = 1 << 20  # scores at once: 4 MB, and about as much again for each comparison


class EmbeddingUnusable(TrainingDiverged):
    """An embedding that points nowhere: not finite, or zero. Its rank would mean nothing."""


def check_embeddings(embedding_ND: Tensor, names: Sequence[str], source: str) -> None:
    """Refuses embeddings that have no direction.

    Args:
        embedding_ND: Raw embeddings.
        names: N names for the message, or fewer where there are none.
        source: What they are of ("imagenet", "class prompts").

    Raises:
        EmbeddingUnusable: A row is not finite or all zeros.
    """
    bad_N = ~torch.isfinite(embedding_ND).all(dim=-1) | (embedding_ND == 0).all(dim=-1)
    if not bool(bad_N.any()):
        return
    place = int(bad_N.nonzero()[0])
    what = f"{names[place]!r}" if place < len(names) else f"number {place}"
    raise EmbeddingUnusable(
        f"{source}: {int(bad_N.sum())} of {len(bad_N)} embeddings are not finite or all zeros, "
        f"first {what}; check the weights, or compute in fp32 where fp16 overflows"
    )


def cosines(query_QD: Tensor, candidate_CD: Tensor) -> Tensor:
    """Returns (Q, C) cosines; candidates with equal embeddings get bit-equal values."""
    return _Candidates(candidate_CD).cosines(query_QD)


class _Candidates:
    """Candidates, each distinct one kept once.

    A matrix product may round two equal columns differently, and a tie would then be decided by
    the kernel.
    """

    def __init__(self, candidate_CD: Tensor) -> None:
        distinct_UD, self._place_C = torch.unique(candidate_CD.float(), dim=0, return_inverse=True)
        self._distinct_UD = normalize(distinct_UD, dim=-1)

    def cosines(self, query_QD: Tensor) -> Tensor:
        """Returns (Q, C) cosines."""
        return (normalize(query_QD.float(), dim=-1) @ self._distinct_UD.T)[:, self._place_C]


def right_ranks(query_QD: Tensor, candidate_CD: Tensor, owner_Q: Tensor, owner_C: Tensor) -> Tensor:
    """Returns the rank of each query's best right candidate, 0 for the first.

    Candidates stand in order of falling cosine; of equal ones the lower index comes first.
    Queries go in portions, so that memory does not grow with Q x C.

    Args:
        query_QD: Raw embeddings.
        candidate_CD: Raw embeddings.
        owner_Q: int64; a candidate is right where its owner is the query's.
        owner_C: int64.

    Returns:
        (Q,) int64 on the CPU.

    Raises:
        DataError: No query or candidate, or a query without a right candidate.
    """
    if len(query_QD) == 0 or len(candidate_CD) == 0:
        raise DataError(f"{len(query_QD)} queries and {len(candidate_CD)} candidates to rank")
    orphans = owner_Q[~torch.isin(owner_Q, owner_C)]
    if len(orphans):
        raise DataError(f"{len(orphans)} queries have no right candidate, first {int(orphans[0])}")
    candidates = _Candidates(candidate_CD)
    index_C = torch.arange(len(candidate_CD), device=candidate_CD.device)
    found: list[Tensor] = []
    for part in range(0, len(query_QD), rows := max(1, MAX_CELLS // len(candidate_CD))):
        cosine_RC = candidates.cosines(query_QD[part : part + rows])
        right_RC = owner_Q[part : part + rows, None] == owner_C[None]
        best_R1 = cosine_RC.masked_fill(~right_RC, -torch.inf).amax(dim=1, keepdim=True)
        equal_RC = cosine_RC == best_R1
        first_R1 = (equal_RC & right_RC).int().argmax(dim=1, keepdim=True)
        before_RC = (cosine_RC > best_R1) | (equal_RC & (index_C < first_R1))
        found.append(before_RC.sum(dim=1).cpu())
    return torch.cat(found)
