"""Make README.md from nbs/index.ipynb: `python tools/readme.py` (no Quarto needed, so that every machine gets the same bytes)."""
import re
from base64 import b64decode
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

def take_pictures(cell, files:dict):
    "Move the pictures that `cell` shows into `files`, and leave links to them"
    alt = re.search(r"^#\| fig-alt:\s*'?(.+?)'?$", cell.source, re.M)
    for o in cell.outputs:
        if 'data' not in o: continue
        kind = next((k for k in ('image/jpeg', 'image/png') if k in o.data), None)
        if kind:
            name = f'images/index-{cell.id}.{kind[6:]}'
            files[name] = b64decode(o.data[kind])
            o.data = {'text/markdown': f'![{alt[1] if alt else ""}]({name})'}
        o.data = {k:v for k,v in o.data.items() if k in ('text/plain', 'text/markdown')}

def render(path:Path=ROOT/'nbs'/'index.ipynb')->tuple[str,dict]: # (text, {path below nbs/: bytes of a picture})
    "The notebook as GitHub Markdown: hidden cells and directives gone, links made relative to the top"
    nb, files = nbformat.read(path, 4), {}
    nb.metadata['language_info'] = dict(name='python') # for the fences of code
    nb.cells = [c for c in nb.cells if c.cell_type!='raw' and not is_hidden(c)]
    for c in nb.cells:
        if c.cell_type!='code': continue
        take_pictures(c, files)
        c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
    body,_ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r'(!?)\[([^\]]*)\]\(([^)\s]+)\)', relink, body)
    body = re.sub(r'\n{3,}', '\n\n', '\n'.join(line.rstrip() for line in body.splitlines()))
    return NOTE + body.strip() + '\n', files

def write():
    "Write README.md and the pictures it shows"
    text, files = render()
    for old in (ROOT/'nbs/images').glob('index-*'): old.unlink()
    for name,data in files.items(): (ROOT/'nbs'/name).write_bytes(data)
    (ROOT/'README.md').write_text(text, encoding='utf-8')

def is_current()->bool:
    "Tell whether README.md and its pictures are what the notebook says"
    text, files = render()
    there = {f'images/{p.name}':p.read_bytes() for p in (ROOT/'nbs/images').glob('index-*')}
    return there==files and (ROOT/'README.md').read_text(encoding='utf-8')==text

if __name__=='__main__': write()
