"""Where a right implementation lands on MNIST: ranges that an independent implementation of each variant measured.

Ten seeds to step 300, five beyond; som_lr 0.001 unless the name says otherwise; index = 0-based forward pass. A value
from the same distribution falls outside a ten-seed range 18 % of the time (five seeds: 33 %): the median over our seeds
is judged, never one run.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

Ranges = dict[str, dict[int, tuple[float, float]]]  # metric -> index -> least, largest
DIGITS = {
    **dict.fromkeys(("unique_tgt", "alive", "ever_winning", "held_out_firing_features"), 0),
    "effective_rank": 1,
    **dict.fromkeys(("adam_over_pull", "need_ratio", "coverage_cv"), 2),
    "held_out_l1": 4,
    "held_out_mse": 4,
}


TINY = ("gradient", "gradient_over_pull", "pull_over_gradient")  # norms of which every order of magnitude counts


def digits(metric: str) -> int:
    """How many decimals a metric is given with, in the ranges and wherever it is shown."""
    return 0 if ">=" in metric else DIGITS.get(metric, 3)


def show(value: float | None, metric: str) -> str:
    """A value of a metric as text, with as many digits as are worth reading; None is empty."""
    if value is None:
        return ""
    if digits(metric) == 0:
        return f"{value:.0f}"
    scientific = abs(value) >= 1e3 or (metric in TINY and 0 < abs(value) < 1e-3)
    return f"{value:.1e}" if scientific else f"{value:.{digits(metric)}f}"


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is known; None where nothing is, as of runs that diverged."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _ranges(text: str) -> Ranges:
    """A first line of metrics, then an index and `least:largest` for each of them; `-` where there is none."""
    heading, *lines = text.strip().splitlines()
    found: Ranges = {metric: {} for metric in heading.split()}
    for line in lines:
        index, *cells = line.split()
        for metric, cell in zip(found, cells, strict=True):
            if cell != "-":
                low, _, high = cell.partition(":")
                found[metric][int(index)] = float(low), float(high or low)
    return found


RANGES: dict[str, Ranges] = {
    "soft-clamp": _ranges("""
        aff_sim   rp_sim    wt_sim_post tgt_sim   alive aff_corr
      0 .230:.384 .055:.076 -.002:.002  .699:.760 64    -.004:.010
      5 .515:.638 .104:.166 .008:.014   .766:.826 64    .024:.053
     10 .716:.817 .155:.231 .041:.058   .797:.860 42:57 .124:.205
     25 .908:.958 .243:.410 .210:.249   .794:.886 26:31 .380:.465
     50 .972:.981 .454:.612 .410:.466   .872:.946 15:23 .473:.598
    100 .983:.990 .359:.639 .641:.702   .841:.925 3:20  .626:.747
    200 .988:.993 .424:.613 .816:.866   .857:.922 8:27  .650:.825
    300 .984:.994 .438:.774 .852:.908   .867:.967 21:31 .685:.847
    """)
    | _ranges("""
        need_min  need_max  need_ratio coverage_cv
      0 .036:.042 .057:.079 1.40:2.03  -
     50 -         -         -          .25:.49
    """)
    | _ranges("""
        aff_sim>=0.5 aff_sim>=0.7 aff_sim>=0.9
     29 3:4          7:8          16:18
    """),
    "bcl-micro": _ranges("""
        aff_sim
      5 .309:.439
     10 .386:.561
     25 .477:.673
     50 .547:.720
    100 .752:.877
    300 .897:.963
    """),
    "bcl-tiny": _ranges("""
        aff_sim
      5 .353:.492
     10 .467:.629
     25 .627:.771
     50 .768:.876
    100 .915:.968
    300 .971:.987
    """),
    "hard-clamp": _ranges("""
        rp_sim    tgt_sim   aff_sim   unique_tgt alive
      0 .005:.021 .342:.429 .274:.350 42:50      64
     50 .078:.481 .537:.787 .955:.972 10:21      13:22
    300 .213:.688 .572:.790 .972:.988 7:14       17:30
    """),
    "hard-rank": _ranges("""
        aff_corr   rp_corr   tgt_sim   wt_sim     unique_tgt alive
      0 -.005:.008 .019:.104 .435:.596 -.002:.002 19:32      64
      4 .017:.056  .052:.157 .531:.658 .004:.007  14:22      64
      9 .189:.256  .071:.193 .569:.672 .036:.048  13:22      49:62
     24 .489:.579  .120:.793 .560:.925 .226:.265  5:17       27:32
     49 .589:.787  .100:.695 .555:.859 .436:.510  5:17       19:24
     99 .637:.843  .131:.938 .602:.979 .663:.757  3:10       2:7
    199 .623:.852  .240:.690 .609:.837 .801:.884  4:13       6:16
    299 .646:.877  .148:.581 .538:.835 .817:.921  4:13       10:21
    """)
    | _ranges("""
        adam_over_pull
      5 .68:.89
     50 .13:.19
    100 .07:.13
    300 .13:.25
    """),
    "decoupled": _ranges("""
         loss      wt_sim     tgt_sim   unique_tgt alive novelty
       0 .472:.474 -.002:.002 .726:.802 14:33      64    .049:.055
       9 .380:.402 .029:.054  .805:.863 12:20      50:60 .077:.098
      49 .121:.129 .417:.580  .834:.942 5:16       38:47 .083:.099
      99 .116:.124 .667:.748  .859:.961 4:14       11:37 .133:.235
     299 .106:.117 .851:.888  .824:.959 5:19       35:44 .055:.079
     499 .098:.101 .861:.886  .804:.877 8:12       36:51 .043:.066
     999 .094:.103 .879:.913  .878:.966 4:11       33:51 .043:.070
    1999 .088:.094 .907:.942  .864:.975 2:10       31:38 .065:.074
    2999 .083:.091 .929:.949  .900:.965 3:7        19:39 .045:.080
    4999 .086:.091 .944:.959  .870:.960 2:8        23:37 .051:.076
    9999 .076:.087 .952:.962  .917:.975 1:7        23:32 .046:.068
    """)
    | _ranges("""
        adam_over_pull
      5 1.9:2.3
     50 .40:.60
    100 .16:.32
    300 .74:1.05
    """),
    **{
        f"rescue_k {k}": _ranges(f"""
            wt_sim loss
        299 {wt_sim} .106:.117
        """)
        for k, wt_sim in {1: ".855:.897", 3: ".846:.897", 8: ".847:.875", 16: ".862:.877"}.items()
    },
    # The same numbers must come out to three decimals: weights and images are given by their seeds.
    **{
        f"random weights {seed}": {"clamped_cosine": {0: (cosine - 0.0005, cosine + 0.0005)}}
        for seed, cosine in {42: 0.2983, 123: 0.2955, 456: 0.3077, 789: 0.3297, 999: 0.3195}.items()
    },
    "random weights": _ranges("""
        rank_cosine rank_correlation clamped_correlation
      0 .745:.750   -.008:.012       -.004:.004
    """),
}
