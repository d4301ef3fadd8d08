"""Draw nbs/images/pipeline.svg, the stages with real (synthetic) chips in them: `python tools/pipeline.py`."""
import base64, io, tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from imagesim.synth import make_delivery

with tempfile.TemporaryDirectory() as tmp:
    delivery = make_delivery(tmp)
    a0, a1 = (np.asarray(delivery.read_painted(i, 4096)) for i in (0, 1)) # (4096, 4096, 3) uint8, one an acquisition

def uri(im, side, quality=82):
    "A picture as a data URI, `side` pixels square"
    buffer = io.BytesIO()
    im.resize((side,side), Image.LANCZOS).save(buffer, 'JPEG', quality=quality)
    return 'data:image/jpeg;base64,'+base64.b64encode(buffer.getvalue()).decode()

tile = uri(Image.fromarray(a0), 360)
def chip(a, x, y): return Image.fromarray(a[y:y+512,x:x+512])

o, W, H = [], 1120, 440
o.append(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" width="{W}" height="{H}" role="img" aria-label="The stages of imagesim, from a delivery to a map">')
o.append('<style>text{font-family:Helvetica,Arial,sans-serif;fill:#1d2b3a}.t{font-size:17px;font-weight:bold}.s{font-size:13px;fill:#4a5a6a}.n{font-size:12px;font-family:Menlo,Consolas,monospace;fill:#2f6f8f}</style>')
o.append('<defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" fill="#7d8b99"/></marker></defs>')
o.append(f'<rect width="{W}" height="{H}" rx="10" fill="#fff"/>')

def box(x,y,w,h,title,lines,nb,planned=True):
    fill, dash = ('#fff', ' stroke-dasharray="5 4"') if planned else ('#eef4f9', '')
    o.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{fill}" stroke="#8fa5b8"{dash}/>')
    o.append(f'<text class="t" x="{x+12}" y="{y+24}">{title}</text>')
    for i,l in enumerate(lines): o.append(f'<text class="s" x="{x+12}" y="{y+44+17*i}">{l}</text>')
    o.append(f'<text class="n" x="{x+12}" y="{y+h-10}">{nb}</text>')

def img(x,y,w,u): o.append(f'<image x="{x}" y="{y}" width="{w}" height="{w}" href="{u}"/>')

def arrow(x1,y1,x2,y2,bend=None):
    d=f'M{x1} {y1}L{x2} {y2}' if bend is None else f'M{x1} {y1}C{x1+bend} {y1} {x2-bend} {y2} {x2} {y2}'
    o.append(f'<path d="{d}" fill="none" stroke="#7d8b99" stroke-width="2" marker-end="url(#a)"/>')

# column 1: delivery and OSM
box(20,24,200,226,'ARD delivery',['COGs at 0.3 m','on a UTM quadkey grid'],'00a_ard', planned=False)
img(57,98,124,tile)
box(20,274,200,150,'OpenStreetMap',['houses, roads, water,','forest, fields, … of every','cell; from Overpass','or an extract'],'01_osm', planned=False)
# column 2
box(270,24,230,226,'Chips',['the COG’s own tiles, spliced;','and where data is missing'],'02_chip · 03_nodata', planned=False)
pos=[(1536,1024),(2560,1792),(1024,2048),(512,2048),(2048,512),(1536,2560)]
for k,(x,y) in enumerate(pos): img(284+(k%3)*69,94+(k//3)*65,62,uri(chip(a0,x,y),160))
box(270,274,230,150,'Labels',['13 classes a place:','present, absent or unmapped;','explore and choose','what to train on'],'04_explore · 04a_dataset', planned=False)
# column 3
box(550,24,230,120,'Network',['multilabel ResNet50,','trained on those labels'],'05_model · 06_train', planned=False)
box(550,164,230,120,'Embeddings',['one vector a chip,','pixels → 128 numbers'],'07_encode', planned=False)
box(550,304,230,120,'Similarity schema',['encoder, vectors, index','and its measured recall'],'08_search', planned=False)
# column 4
box(830,24,270,172,'Where else?',['it looks like this'],'08_search', planned=False)
for k,(x,y) in enumerate([(1536,1024),(3180,1500),(1560,3480),(1900,1230)]):
    img(842+k*64,78,58,uri(chip(a1,x,y),150))
    o.append(f'<rect x="{842+k*64}" y="78" width="58" height="58" fill="none" stroke="{"#e4572e" if k==0 else "#2f6f8f"}" stroke-width="{3 if k==0 else 1}"/>')
o.append('<text class="s" x="842" y="155">query</text><text class="s" x="906" y="155">places that look alike</text>')
box(830,210,270,130,'Where did it change?',['two dates of a place'],'09_change')
img(984,246,50,uri(chip(a0,2660,160),140)); img(1042,246,50,uri(chip(a1,2660,160),140))
o.append('<text class="s" x="984" y="312">2019</text><text class="s" x="1042" y="312">2021</text>')
box(830,354,270,70,'Map, HTTP, shell, notebook',[],'10_serve · 11_cli', planned=False)
arrow(220,137,268,137); arrow(220,349,268,349)
arrow(500,110,548,84,20); arrow(500,349,548,110,24); arrow(500,180,548,215,20)
arrow(665,144,665,162); arrow(665,284,665,302)
arrow(780,364,828,130,24); arrow(780,364,828,280,24); arrow(780,372,828,390,20)
o.append('</svg>')
(Path(__file__).resolve().parent.parent/'nbs/images/pipeline.svg').write_text('\n'.join(o)+'\n', encoding='utf-8')
