"""PCAAttn: attend with the approximate scores themselves, to all keys (Singhania et al. 2024, appendix)."""

from jaxtyping import Float
from torch import Tensor

from fourfold_loki.certificate import ScoreBounds
from fourfold_loki.selectors.base import Candidates, Selector
from fourfold_loki.selectors.loki import Loki


class PcaAttention(Loki):
    """Loki without its second step: the leading coordinates decide and weigh. For a budget of everything.

    It is here since the paper shows by it that exact scores of the kept keys are needed.
    """

    def compared(
        self, among: Candidates
    ) -> tuple[
        Float[Tensor, "batch heads query coordinate"],
        Float[Tensor, "batch kv_heads token coordinate"],
    ]:
        """The leading coordinates."""
        queries, keys = self.turned(among)
        width = self.widths[among.layer]
        return queries[..., :width], keys[..., :width]

    def cost(self, *, head_width: int, group: int) -> float:
        """Of every key, the coordinates beyond the leading ones are not read at all."""
        return super().cost(head_width=head_width, group=group) - 1

    def bounds(self, among: Candidates) -> ScoreBounds:
        """None: what it weighs values by are no scores of whole keys."""
        return Selector.bounds(self, among)
