"""Double Sparsity: rank by a few fixed coordinates, chosen offline (Yang et al. 2024)."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from fourfold_loki.attention import scores_of
from fourfold_loki.moments import Statistics
from fourfold_loki.selectors.base import Candidates, Selector


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DoubleSparsity(Selector):
    """The label channels: those that carry most of the variance of q·k."""

    channels: Int[Tensor, "layers kv_heads channel"]

    @classmethod
    def from_statistics(cls, statistics: Statistics, *, channels: int) -> "DoubleSparsity":
        """Channels i of largest E[q_i²] Var[k_i], for each key/value head."""
        spread = statistics.keys.covariance(centred=True).diagonal(dim1=-2, dim2=-1)
        power = statistics.queries.covariance(centred=False).diagonal(dim1=-2, dim2=-1)
        return cls(channels=(spread * power).topk(channels, dim=-1).indices)

    def scores(self, among: Candidates) -> Float[Tensor, "batch heads query token"]:
        """Scores over the label channels alone."""
        labels = self.channels[among.layer]
        group = among.queries.shape[1] // among.keys.shape[1]
        queries = among.queries.gather(
            -1,
            labels.repeat_interleave(group, 0)[None, :, None].expand(
                among.queries.shape[0], -1, among.queries.shape[2], -1
            ),
        )
        keys = among.keys.gather(
            -1,
            labels[None, :, None].expand(among.keys.shape[0], -1, among.keys.shape[2], -1),
        )
        return scores_of(queries, keys, scaling=among.scaling)

    def cost(self, *, head_width: int, group: int) -> float:
        """The label channels, kept apart."""
        del group
        return self.channels.shape[-1] / head_width
