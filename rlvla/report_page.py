"""The parts every section of the report is made of, and its style."""

import re
from collections.abc import Iterable, Sequence
from html import escape

from rlvla.svg import CHART_CSS

SIGNIFICANCE = 0.05


def html_section(title: str, body: str, lead: str = "") -> str:
    """A section with a heading; `lead` and `body` are HTML."""
    return f"<section><h2>{escape(title)}</h2>{f'<p class=lead>{lead}</p>' if lead else ''}{body}</section>\n"


def html_figure(title: str, chart: str, note: str = "") -> str:
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><h3>{escape(title)}</h3>{chart}{caption}</figure>"


def html_missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def html_table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), css: str = "") -> str:
    """Cells are HTML. The first one of a row is its header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = [f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) for row in rows]
    lines = [f"<tr>{cells}</tr>" for cells in ([top, *body] if head else body)]
    return f'<div class="scroll"><table class="{css}">{"".join(lines)}</table></div>'


def html_p_value(value: float) -> str:
    if value >= 0.001 or value == 0:
        return f"{value:.3f}".rstrip("0").rstrip(".")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')} × 10<sup>−{abs(int(exponent))}</sup>"


# The only script. A click plays or stops both films of a pair together; without it each has its controls.
SCRIPT = """
for (const pair of document.querySelectorAll(".pair")) {
  const films = [...pair.querySelectorAll("video")], button = pair.querySelector("button");
  const toggle = () => {
    const play = films[0].paused;
    for (const film of films) {
      if (play) { film.currentTime = 0; film.play(); } else film.pause();
    }
    button.textContent = play ? "stop" : "play";
  };
  if (!films.length) continue;
  button.hidden = false;
  button.onclick = toggle;
  for (const film of films) { film.controls = false; film.onclick = toggle; }
}
"""

PAGE_CSS = """
:root{color-scheme:light dark;--paper:#fffefb;--ink:#1c1d20;--muted:#62656b;--faint:#a9abae;--hair:#e7e5df;
--after:#0a6aa6;--before:#7d858d;--warm:#c8551b;--violet:#8156b3;--green:#2a8060;--wash:#f6f4ee;
--sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif;
--serif:Charter,"Bitstream Charter","Iowan Old Style",Palatino,Georgia,"DejaVu Serif",serif}
@media(prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e6e4df;--muted:#9fa3a8;--faint:#5f646a;
--hair:#2b2e33;--after:#5ab4ea;--before:#9aa3ac;--warm:#f0894f;--violet:#b592e0;--green:#5cc39c;--wash:#1d2024}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 var(--sans);
-webkit-text-size-adjust:100%}
main{max-width:1000px;margin:0 auto;padding:36px 20px 64px}
h1{font:600 30px/1.2 var(--serif);margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font:600 19px/1.3 var(--serif);margin:0 0 6px} h3{font:600 13px/1.3 var(--sans);margin:0 0 6px}
section{margin-top:34px;padding-top:14px;border-top:1px solid var(--hair)} p{margin:0 0 8px}
sup{line-height:0;font-size:.75em} .lead{max-width:72ch;font-size:14px}
.lead,.names,.facts,figcaption,.key,.missing{color:var(--muted)} .missing{font-style:italic}
.names{overflow-wrap:anywhere} .names b{font-weight:500;color:var(--ink)}
.verdict{font:400 24px/1.35 var(--serif);margin:20px 0 12px;padding-left:16px;max-width:40em;
border-left:4px solid var(--faint)} .better{border-color:var(--after)} .worse{border-color:var(--warm)}
.verdict data{font-weight:600;white-space:nowrap} .verdict small{display:block;font:15px/1.5 var(--sans);
color:var(--muted);margin-top:6px} .verdict small data{color:var(--ink)}
.facts,.problems{font-size:14px} .unfinished,.problems{color:var(--warm)}
figure{margin:0;min-width:0} figcaption{font-size:12.5px;line-height:1.4;margin-top:4px}
.grid{display:grid;gap:26px 30px} .grid+details{margin-top:22px}
.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}
.three{grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr))}
.four{grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
.split{display:grid;gap:20px 40px;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr))}
.prose{font-size:14px;padding-top:2px}
.scroll{overflow-x:auto} table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 18px 4px 0;font-weight:400;border-bottom:1px solid var(--hair);
vertical-align:baseline} th[scope=col]{color:var(--muted);font-size:12.5px}
.numbers th,.numbers td{text-align:right;white-space:nowrap} .pairs td b{font-size:17px}
.settings th,.time th{color:var(--muted)} .time{width:100%} .time td{white-space:nowrap}
.time td:last-child{width:50%;padding:0} .bar{display:block;height:9px;background:var(--after);opacity:.75}
.key{font-size:12.5px;margin-top:8px} .key span{margin-right:16px;white-space:nowrap}
.key i{display:inline-block;width:9px;height:9px;margin-right:5px;border-radius:2px;
border:1px solid var(--tint)} .key .full{background:var(--tint)}
.films{display:flex;gap:8px} .film{flex:1;min-width:0} .film p{font-size:13px;margin:2px 0 0}
video{display:block;width:100%;background:var(--wash);border-radius:3px;cursor:pointer}
.film.none{display:grid;place-items:center;background:var(--wash);color:var(--muted);font-size:13px}
.badge{font-weight:600;float:right} .solved{color:var(--green)} .failed{color:var(--warm)}
button{font:inherit;color:var(--after);background:none;border:0;padding:0;cursor:pointer;
text-decoration:underline} ul{padding-left:20px;margin:0}
details{margin-top:14px} summary{cursor:pointer;color:var(--muted)} details>*+*{margin-top:8px}
pre{background:var(--wash);padding:12px 14px;overflow-x:auto;font-size:12.5px;line-height:1.45}
code{font-size:12px;color:var(--muted)}
@media(max-width:600px){main{padding:22px 16px 48px} h1{font-size:25px} .verdict{font-size:20px}
.settings td:last-child{display:none}}
@media print{details{display:none} section{break-inside:avoid}}
"""


def stand_alone(chart: str) -> str:
    """A chart of `rlvla.svg` as a file of its own, with the report's style inside."""
    styled = chart.replace("<title>", f"<style>{PAGE_CSS}{CHART_CSS}</style><title>", 1)
    # On a page labels may stand outside the frame; a file is cut there.
    styled = re.sub(
        r'viewBox="0 0 ([\d.]+) ([\d.]+)"',
        lambda m: f'viewBox="-20 -10 {float(m[1]) + 40:g} {float(m[2]) + 20:g}"',
        styled,
        count=1,
    )
    return styled.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
