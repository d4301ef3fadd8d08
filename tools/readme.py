"""Make README.md from nbs/index.ipynb: `python tools/readme.py` (no Quarto needed, so that every machine gets the same bytes)."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTE = '<!-- Made from nbs/index.ipynb by tools/readme.py; edit the notebook. -->\n\n'

def is_hidden(cell): return bool(re.search(r'^#\|\s*(hide|default_exp|include:\s*false)', cell.source, re.M))

def relink(match):
    "Point a link that is relative to nbs/ at the file as seen from the top, and a notebook at its place in the repository"
    bang, text, target = match.groups()
    return match[0] if re.match(r'[a-z]+:|#|/', target) else f'{bang}[{text}](nbs/{target})'

def render(path:Path=ROOT/'nbs'/'index.ipynb')->str:
    "The notebook as GitHub Markdown: hidden cells and directives gone, links made relative to the top"
    nb = nbformat.read(path, 4)
    nb.metadata['language_info'] = dict(name='python') # for the fences of code
    nb.cells = [c for c in nb.cells if c.cell_type!='raw' and not is_hidden(c)]
    for c in nb.cells:
        if c.cell_type!='code': continue
        c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
        for o in c.outputs: # a README shows text; pictures are files in nbs/images, linked from prose
            if 'data' in o: o.data = {k:v for k,v in o.data.items() if k in ('text/plain', 'text/markdown')}
    body,_ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r'(!?)\[([^\]]*)\]\(([^)\s]+)\)', relink, body)
    body = re.sub(r'\n{3,}', '\n\n', '\n'.join(line.rstrip() for line in body.splitlines()))
    return NOTE + body.strip() + '\n'

if __name__=='__main__': (ROOT/'README.md').write_text(render(), encoding='utf-8')
