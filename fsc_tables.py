"""The files of FSC curves that other programs read: .csv, RELION's star file, EMDB's XML.

`columns` holds the columns of a table by name, lists of equal length: shell, per_angstrom (spatial
frequency in 1/Å), angstrom (its inverse), then one per curve.
"""

import math
from xml.sax.saxutils import quoteattr

# RELION's names of the columns, in its order.
STAR = {
    "shell": "_rlnSpectralIndex",
    "per_angstrom": "_rlnResolution",
    "angstrom": "_rlnAngstromResolution",
    "corrected": "_rlnFourierShellCorrelationCorrected",
    "unmasked": "_rlnFourierShellCorrelationUnmaskedMaps",
    "masked": "_rlnFourierShellCorrelationMaskedMaps",
    "randomised": "_rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps",
}


def csv_table(columns: dict[str, list]) -> str:
    rows = [list(columns), *zip(*columns.values())]
    texts = [[f"{x:.6g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    return "".join(",".join(row) + "\n" for row in texts)


def postprocess_star(columns: dict[str, list], best: float) -> str:
    """RELION's postprocess.star: data_general with the best resolution in Å, and data_fsc."""
    # Without a mask the corrected curve is the unmasked one.
    columns = {"corrected": columns["unmasked"]} | columns
    names = [name for name in STAR if name in columns]
    lines = ["data_general", "", f"_rlnFinalResolution {best:.6f}", "", "data_fsc", "", "loop_"]
    lines += [f"{STAR[name]} #{i}" for i, name in enumerate(names, 1)]

    # One row per shell. RELION writes 999 Å for the zero frequency.
    for shell, *row in zip(*(columns[name] for name in names)):
        texts = [f"{999.0 if math.isinf(value) else value:12.6f}" for value in row]
        lines.append(f"{shell:6d} " + " ".join(texts))
    return "\n".join(lines) + "\n"


def emdb_xml(columns: dict[str, list], curve: str) -> str:
    """One curve, by the name of its column, as EMDB's deposition takes it: 1/Å and FSC.

    Shells that are nan are left out.
    """
    title = quoteattr(f"FSC, {curve}")
    axes = 'xaxis="Resolution (A-1)" yaxis="Correlation Coefficient"'
    lines = [f"<fsc title={title} {axes}>"]
    for frequency, value in zip(columns["per_angstrom"], columns[curve]):
        if not math.isnan(value):
            lines.append("  <coordinate>")
            lines.append(f"    <x>{frequency:.6f}</x>")
            lines.append(f"    <y>{value:.6f}</y>")
            lines.append("  </coordinate>")
    return "\n".join([*lines, "</fsc>", ""])
