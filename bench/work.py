"""What scoring has to compute, whatever the time it takes: tokens, and products in forwards of the plain model."""

from collections.abc import Sequence
from typing import NamedTuple

from ceilings import gemm_flops_per_s

from muka_fast.data import TextSet, tokenize
from muka_fast.footprint import footprint
from muka_fast.teachers import Teacher


class Work(NamedTuple):
    """Of all teachers over all texts. tokens: their sum; plain_flops: of one plain forward each; gemm_flops_per_s: measured, in the
    teachers' precision."""

    tokens: int
    plain_flops: float
    gemm_flops_per_s: float

    def rates(self, seconds: float, plain_s: float, forwards: float, samples: float) -> dict[str, float]:
        """Tokens times passes a second, whatever part of a pass is repeated; the products' share of the matrix rate, and the plain
        pass's. forwards: plain forwards' worth of products, layers that teachers share counted for each."""
        return {
            "mc_tokens_per_s": self.tokens * samples / seconds,
            "share_of_gemm": self.plain_flops * forwards / seconds / self.gemm_flops_per_s,
            "plain_share_of_gemm": self.plain_flops / plain_s / self.gemm_flops_per_s,
        }


def work_of(teachers: Sequence[Teacher], texts: TextSet, max_length: int, device: str, toy: bool) -> Work:
    lengths = [tokenize(teacher.tokenizer, texts.texts, max_length).lengths for teacher in teachers]
    flops = [
        len(texts.texts) * footprint(teacher.model.config, 1, round(float(found.mean())), "fp32", teacher.name).forward_flops
        for teacher, found in zip(teachers, lengths, strict=True)
    ]
    return Work(sum(int(found.sum()) for found in lengths), sum(flops), gemm_flops_per_s(device, toy, teachers[0].model.dtype))
