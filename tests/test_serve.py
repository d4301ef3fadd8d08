"""The server, as a process of its own: what it answers, what it refuses, what it outlives"""
import fcntl, io, json, math, os, random, re, shutil, signal, socket, struct, subprocess, sys, threading, time, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx, pytest
from PIL import Image

from conftest import ROOT

CLASSES = ['houses', 'forest', 'water']
LONG = 240. # seconds that nothing takes, on a slow machine neither
PATIENT = dict(head_seconds=LONG, body_seconds=LONG, answer_seconds=LONG, heavy_seconds=LONG, send_seconds=LONG)

def until(true):
    "Ask again and again"
    end = time.monotonic()+LONG
    while not (out := true()):
        assert time.monotonic()<end, 'this never came true'
        time.sleep(.05)
    return out

def build(root:Path):
    "A small delivery with everything a server can show; the network knows nothing, but it answers"
    import torch
    from safetensors.torch import save_file
    from imagesim.bundle import make_bundle
    from imagesim.chip import chip_ard
    from imagesim.encode import encode
    from imagesim.infra import Layout
    from imagesim.labels import label_places
    from imagesim.model import MultilabelResnetFC
    from imagesim.osm import fetch_osm, plan_osm
    from imagesim.similarity import build_schema
    from imagesim.synth import make_delivery
    layout = Layout(root)
    make_delivery(root, size=3, dates=2)
    fetch_osm(plan_osm(33, layout.ard, root/'osm/synthetic.osm.pbf'), work_dir=root/'.work')
    chip_ard(layout.ard, layout.chips, virtual=True, proc=1)
    label_places(layout.ard, 'land13', out=layout.labels, proc=1)
    torch.manual_seed(0)
    net = MultilabelResnetFC(CLASSES, 'tinynet', 'checkpoint', 'conv', loss='bce').eval()
    run = root/'models/r'
    run.mkdir(parents=True)
    (run/'config.json').write_text(json.dumps(dict(form=1, run='r', classes=CLASSES, recipe=dict(backbone='tinynet', head='conv', size=64))))
    save_file(net.state_dict(), run/'weights.safetensors')
    make_bundle(run, root/'bundle', credits='network by nobody <b>')
    encode(root/'bundle', layout.chips, layout.embeddings, layout.ard, workers=0, device='cpu')
    build_schema('land', root/'bundle', Path(layout.embeddings)/'r', layout.schemas)

def furnish(town:Path, root:Path):
    "Give a copy of the shared data root; make that first where nobody has"
    with open(f'{town}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (town/'whole').exists():
            shutil.rmtree(town, ignore_errors=True)
            build(town)
            (town/'whole').touch()
    shutil.copytree(town, root)

def client(url:str)->httpx.Client:
    "A client with time, that keeps no connection: the server might close it just as it is used"
    return httpx.Client(base_url=url, timeout=LONG, limits=httpx.Limits(max_keepalive_connections=0))

def serve(root:str, **options):
    "What the process runs"
    from imagesim.serve import Limits, run_server
    if 'limits' in options: options['limits'] = Limits(**options['limits'])
    run_server(**dict(ard=f'{root}/ard', data_root=root, port=0, tell=lambda line: print(line, flush=True))|options)

class Process:
    "A server in a process of its own"
    def __init__(self, root, town=None, **options):
        code = f'import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT/"tests")!r}]; import test_serve as t; from pathlib import Path\n' + (f't.furnish(Path({str(town)!r}), Path({str(root)!r}))\n' if town else '') + f't.serve({str(root)!r}, **{options!r})'
        self.log = open(Path(root).parent/f'log-{time.monotonic_ns()}.txt', 'w')
        self.p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=self.log, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1'})
        self.root, self.lines = Path(root), []
        for line in self.p.stdout:
            self.lines.append(line.rstrip())
            if m := re.search(r'open (http://\S+?:(\d+)/)', line): self.url, self.port = m[1], int(m[2]); break
        else: raise AssertionError(self.errors())
        self.http = client(self.url)
    def errors(self)->str: return Path(self.log.name).read_text()
    def get(self, *a, **kw): return self.http.get(*a, **kw)
    def post(self, *a, **kw): return self.http.post(*a, **kw)
    def raw(self, data:bytes, read=True, timeout=LONG)->bytes:
        "Send bytes that are no good HTTP client's"
        with socket.create_connection(('127.0.0.1', self.port), timeout=timeout) as s:
            s.sendall(data)
            out = b''
            while read and (part := s.recv(65536)): out += part
            return out
    def memory(self)->int: return int(re.search(r'VmRSS:\s+(\d+)', Path(f'/proc/{self.p.pid}/status').read_text())[1])*1024
    def libraries(self)->str: return Path(f'/proc/{self.p.pid}/maps').read_text()
    def stop(self, sig=signal.SIGTERM)->int:
        if self.p.poll() is None: self.p.send_signal(sig)
        code = self.p.wait(LONG)
        self.http.close(); self.log.close(); self.p.stdout.close()
        return code

@pytest.fixture(scope='module')
def server(tmp_path_factory, town):
    "A server with everything; it makes its data first, since it has the libraries for that in memory then"
    p = Process(tmp_path_factory.mktemp('served')/'root', town, limits=PATIENT)
    yield p
    assert p.stop()==0 and 'Traceback' not in p.errors(), p.errors()

@pytest.fixture(scope='module')
def root(server): return server.root

@pytest.fixture(scope='module')
def chip(server):
    r = server.post('/api/search', json=dict(classes='water', k=1)).json()
    return r['features'][0]['properties']

def pixel(lon, lat, z):
    s = math.sin(math.radians(lat))
    return (lon/360+.5)*2**z, (.5-math.log((1+s)/(1-s))/(4*math.pi))*2**z

def tile_of(chip, z=19): return tuple(int(v) for v in pixel(chip['lon'], chip['lat'], z))

def error(r): return r.status_code, r.json()['error']['code']

# ---- what it answers

def test_config_says_what_there_is(server):
    r = server.get('/api/config')
    c = r.json()
    assert r.headers['content-encoding']=='gzip' and len(c['dates'])==2 and len(c['acquisitions'])==2 and c['labels'] and c['verdicts']
    col = c['schemas'][0]['collections'][0]
    assert (c['schemas'][0]['name'], col['name'], col['chips'], col['classes'], col['heat'], col['exact'])==('land', 'main', 18, CLASSES, True, True)
    assert set(col['class_colours'])==set(CLASSES) and re.fullmatch('#[0-9a-f]{6}', col['class_colours']['water'])
    assert any('Maxar' in x for x in c['credits']) and any('OpenStreetMap' in x for x in c['credits']) and c['tiles']['url'].startswith('tiles/{z}/')
    w,s,e,n = c['bounds']
    assert w<c['focus'][0]<c['center'][0]<c['focus'][2]<e and s<c['focus'][1]<c['center'][1]<c['focus'][3]<n
    assert server.get('/api/config', headers={'if-none-match':r.headers['etag']}).status_code==304
    assert [a['rank'] for a in c['acquisitions']]==[0,1] and server.get('/api/config').json()['acquisitions']==c['acquisitions']

def test_what_lies_on_top_comes_first(server, chip):
    x,y = tile_of(chip)
    first, second = (a['catalog_id'] for a in server.get('/api/config').json()['acquisitions'])
    best, one, other = (server.get(f'/tiles/19/{x}/{y}.png{q}').content for q in ('', f'?catalog_id={first}', f'?catalog_id={second}'))
    assert best==one!=other # this chip was seen whole on both days

def test_suggestions_are_seen_whole_and_clear(server):
    s = server.get('/api/examples').json()['suggestions']
    everything = [f['properties'] for f in ask(server, classes=CLASSES[0], k=18).json()['features']]
    assert s and [o['chips'] for o in s]==sorted((o['chips'] for o in s), reverse=True)
    def whole(p): return p['valid']>=.99
    def fair(p): return whole(p) and (p['clear'] or 0)>=.9
    for o in s:
        p_of = lambda p: p['probs'][o['class']]
        likely, shown = [p for p in everything if p_of(p)>.501], next(p for p in everything if p['chip']==o['chip'])
        assert len(likely)<=o['chips']<=sum(p_of(p)>=.499 for p in everything) # they are rounded
        good = next((g for g in (fair, whole) if any(map(g, likely))), None)
        assert good is None or good(shown) and p_of(shown)>=max(p_of(p) for p in likely if good(p))

def test_without_the_extra_it_says_what_to_install():
    code = "import sys\nfor m in ('fastapi','starlette','uvicorn','prometheus_client'): sys.modules[m] = None\nimport imagesim.service\ntry: import imagesim.serve\nexcept imagesim.infra.InputError as e: print(e)"
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert "a server needs fastapi, prometheus_client, uvicorn, not installed here: pip install 'imagesim[serve]'" in p.stdout, p.stderr

def test_tiles_in_every_way(server, chip):
    version = server.get('/api/config').json()['tiles']['version']
    x,y = tile_of(chip)
    for ext,kind in dict(png='image/png', jpg='image/jpeg', webp='image/webp').items():
        for size in (256,512):
            r = server.get(f'/tiles/19/{x}/{y}.{ext}?size={size}')
            assert r.headers['content-type']==kind and Image.open(io.BytesIO(r.content)).size==(size,size)
    a, b = server.get(f'/tiles/19/{x}/{y}.png?v={version}'), server.get(f'/tms/1.0.0/19/{x}/{2**19-1-y}.png')
    assert a.content==b.content and 'immutable' in a.headers['cache-control'] and 'immutable' not in b.headers['cache-control']
    assert server.get(f'/tiles/19/{x}/{y}.png', headers={'if-none-match':a.headers['etag']}).status_code==304
    assert server.get(f'/tiles/19/{x}/{y}.png', headers={'if-none-match':'"other", W/'+a.headers['etag']}).status_code==304
    head = server.http.head(f'/tiles/19/{x}/{y}.png')
    assert head.status_code==200 and not head.content and int(head.headers['content-length'])==len(a.content)
    pictures = {q:server.get(f'/tiles/19/{x}/{y}.png?{q}') for q in ('until=2020-01-01', 'on=2021-08-22', 'select=oldest', 'select=newest', 'on=1990-01-01')}
    assert pictures['until=2020-01-01'].content==pictures['select=oldest'].content!=pictures['on=2021-08-22'].content==pictures['select=newest'].content
    assert len({r.headers['etag'] for r in pictures.values()})==5
    empty = Image.open(io.BytesIO(pictures['on=1990-01-01'].content)).convert('RGBA')
    assert empty.getextrema()[3]==(0,0) and server.get('/tiles/5/0/0.webp').status_code==200
    assert server.get('/tiles/0/0/0.png').status_code==200

@pytest.mark.parametrize('path', ['/tiles/3/8/0.png', '/tiles/25/0/0.png', '/tiles/-1/0/0.png', '/tiles/3/a/0.png', '/tiles/3/0/0.gif', '/tiles/3/0/0.png?size=300', '/tiles/3/0/0.png?on=2020-13-01',
    '/tiles/3/0/0.png?on=2020-01-01&until=2020-01-01', '/tiles/3/0/0.png?catalog_id=../x', '/tiles/3/0/0.png?file=x', '/tiles/99999999999999999999/0/0.png', '/tms/1.0.0/3/0/8.png', '/api/grid?bbox=1,2,3', '/api/grid?bbox=10,50,20,40',
    '/api/grid?bbox=1,2,3,4&level=13', '/api/at?lon=nan&lat=1', '/api/at?lon=13', '/api/at?lon=13&lat=89', '/api/chip/x', '/api/verdicts?schema=..'])
def test_what_is_wrong_in_an_address_is_told(server, path):
    status, code = error(server.get(path))
    assert (status, code)==(400,'bad_input')

def test_documents_for_other_clients(server):
    j = server.get('/tilejson.json').json()
    assert j['scheme']=='xyz' and j['tiles'][0].startswith(server.url+'tiles/{z}/{x}/{y}')
    import xml.etree.ElementTree as ET
    for path in ('/tms/', '/tms/1.0.0/', '/wmts/1.0.0/WMTSCapabilities.xml', '/wmts?service=WMTS&request=GetCapabilities'):
        r = server.get(path)
        assert r.status_code==200 and r.headers['content-type'].startswith('application/xml'), path
        ET.fromstring(r.content)
    layer = ET.fromstring(server.get('/tms/1.0.0/').content)
    for z,o in enumerate(layer.find('TileSets')):
        assert float(o.get('units-per-pixel'))==pytest.approx(2*math.pi*6378137/256/2**z) and o.get('href')==f'{server.url}tms/1.0.0/{z}'
    template = re.search(r'template="([^"]+png[^"]*)"', server.get('/wmts/1.0.0/WMTSCapabilities.xml').text)[1].replace('&amp;','&')
    r = server.get(template.replace('{TileMatrix}','3').replace('{TileCol}','4').replace('{TileRow}','2'))
    assert r.status_code==200 and r.headers['content-type']=='image/png'

def test_what_lies_at_a_position(server, chip):
    r = server.get('/api/at', params=dict(lon=chip['lon'], lat=chip['lat'])).json()
    assert r['place']==chip['place'] and [c['date'] for c in r['chips']]==['2021-08-22','2019-05-09'] and all(c['indexed'] for c in r['chips']) and r['chip']==r['chips'][0]['chip']
    assert len(r['labels'])==13 and {o['state'] for o in r['labels']}<={'present','absent','unmapped'} and {o['unit'] for o in r['labels']}=={'share','m'}
    assert [o['class'] for o in r['probs']]==sorted(CLASSES, key=lambda c: -{o['class']:o['p'] for o in r['probs']}[c])
    assert server.get('/api/at', params=dict(lon=chip['lon'], lat=chip['lat'], date='2019-06-01')).json()['chip']==r['chips'][1]['chip']
    other = server.get(f"/api/chip/{r['chips'][1]['chip']}").json()
    assert other['chip']==r['chips'][1]['chip'] and other['place']==r['place']
    assert error(server.get('/api/at?lon=20&lat=10'))==(404,'not_found')
    assert error(server.get(f"/api/chip/{chip['place']}_NOBODY.jpg"))==(404,'not_found')
    assert error(server.get('/api/at', params=dict(lon=chip['lon'], lat=chip['lat'], collection='nope')))==(404,'not_found')

def test_pictures_of_a_chip(server, chip):
    r = server.get(f"/api/chip/{chip['chip']}/image")
    assert Image.open(io.BytesIO(r.content)).size==(512,512) and r.headers['content-type']=='image/jpeg'
    assert Image.open(io.BytesIO(server.get(f"/api/chip/{chip['chip']}/image?px=100").content)).size==(100,100)
    assert server.get(f"/api/chip/{chip['chip']}/image", headers={'if-none-match':r.headers['etag']}).status_code==304
    assert error(server.get(f"/api/chip/{chip['place']}_NOBODY.jpg/image"))==(404,'not_found')
    assert error(server.get(f"/api/chip/{chip['chip']}/image?px=5000"))==(400,'bad_input')
    heat = server.get(f"/api/chip/{chip['chip']}/heat?class=water&px=128")
    im = Image.open(io.BytesIO(heat.content))
    assert im.mode=='RGBA' and im.size==(128,128) and im.getextrema()[3][1]>0
    assert error(server.get(f"/api/chip/{chip['chip']}/heat?class=nope"))==(404,'not_found')

def test_features_behind_labels(server, chip):
    found = [server.get(f'/api/labels/{p}').json() for p in {f['properties']['id'] for f in server.get('/api/grid', params=dict(bbox='{:f},{:f},{:f},{:f}'.format(chip['lon']-.003, chip['lat']-.003, chip['lon']+.003, chip['lat']+.003), level=17)).json()['features']}]
    features = [f for r in found for f in r['features']]
    assert features and 'OpenStreetMap' in found[0]['attribution']
    for f in features: assert f['properties']['class'] in f['properties']['classes'] and re.fullmatch(r'[nwr]\d+|sea', f['properties']['osm_id']) and all(isinstance(v, str) for v in f['properties']['tags'].values())
    one = server.get(f"/api/labels/{chip['place']}").json()
    box = server.get(f"/api/chip/{chip['chip']}").json()['outline']['coordinates'][0]
    west, east = min(p[0] for p in box), max(p[0] for p in box)
    def points(c): return [c] if isinstance(c[0], float) else [p for o in c for p in points(o)]
    assert all(west-1e-5<=p[0]<=east+1e-5 for f in one['features'] for p in points(f['geometry']['coordinates']))
    assert error(server.get('/api/labels/Z33-03111112303000000'.replace('0311111230','0311111231')))==(404,'not_found')

def test_grid(server, chip):
    world = server.get('/api/grid?bbox=-180,-85,180,85').json()
    assert len(world['features'])==1 and not world['truncated']
    assert server.get('/api/grid?bbox=100,0,101,1').json()['features']==[]
    places = server.get('/api/grid?bbox=-180,-85,180,85&level=17').json()
    assert len(places['features'])==1024
    assert server.get('/api/grid?bbox=170,-85,-170,85').json()['features']==[]

# ---- search

def ask(server, **q): return server.post('/api/search', json=q)

def test_search_by_everything(server, chip, root):
    from imagesim.search import Searcher
    s = Searcher(root/'schemas/land', chips=root/'chips', ard=root/'ard')
    r = ask(server, chip=chip['chip'], k=5).json()
    want = s.search(chip['chip'], k=5)
    assert [f['properties']['chip'] for f in r['features']]==list(want.chip) and [f['properties']['score'] for f in r['features']]==pytest.approx(list(want.score), abs=1e-6)
    assert r['score']==dict(name='cosine', range=[-1.,1.], text='cosine') and r['exact'] and r['total']==17 and [f['properties']['rank'] for f in r['features']]==[1,2,3,4,5]
    assert 'network by nobody <b>' in r['credits'] and set(r['features'][0]['properties']['probs'])==set(CLASSES) and r['funnel'][0]==['all chips',18,0]
    at = ask(server, lonlat=[chip['lon'],chip['lat']], date='2019-05-09', k=3).json()
    assert [f['properties']['chip'] for f in at['features']]==list(s.search(lonlat=(chip['lon'],chip['lat']), date='2019-05-09', k=3).chip)
    a, b, c = list(s.search(classes='water', k=3).chip)
    many = ask(server, like=[a,{'lonlat':[chip['lon'],chip['lat']]}], unlike=[c], k=4, where='valid>=0.1').json()
    assert [f['properties']['chip'] for f in many['features']]==list(s.search(like=[a,(chip['lon'],chip['lat'])], unlike=[c], k=4, where='valid>=0.1').chip) and many['score']['name']=='probability'
    line = ask(server, classes='water and forest, no houses', k=4).json()
    assert [f['properties']['chip'] for f in line['features']]==list(s.search(classes='water and forest, no houses', k=4).chip)

def test_filters(server, chip):
    lon, lat = chip['lon'], chip['lat']
    def chips(**f): return [o['properties'] for o in ask(server, chip=chip['chip'], k=20, filters=f).json()['features']]
    assert all(p['date']=='2019-05-09' for p in chips(on='2019-05-09')) and len(chips(on='2019-05-09'))>=8
    assert len({p['place'] for p in chips(one_a_place=True)})==len(chips(one_a_place=True))
    assert all(p['place']!=chip['place'] for p in chips(other_place=True))
    assert all(abs(p['lon']-lon)<.001 for p in chips(box=[lon-.001,lat-.001,lon+.001,lat+.001]))
    triangle = dict(type='Polygon', coordinates=[[[lon-.001,lat-.001],[lon+.001,lat-.001],[lon,lat+.001],[lon-.001,lat-.001]]])
    assert {p['place'] for p in chips(polygon=triangle)}=={chip['place']}
    assert all(p['probs']['water']>=.4 for p in chips(probs=dict(water=.4)))
    nothing = ask(server, chip=chip['chip'], filters=dict(on='1999-01-01'))
    assert nothing.status_code==200 and nothing.json()['features']==[] and '1999-01-01' in nothing.json()['note'] and nothing.json()['total']==0

@pytest.mark.parametrize('q', [{}, dict(chip='../../../etc/passwd'), dict(chip='/etc/passwd'), dict(chip='x.jpg'), dict(like=['picture.jpg']), dict(like=['s3://bucket/a.png']), dict(like=['http://169.254.169.254/']), dict(unlike=[{'path':'x'}]),
    dict(image='x'), dict(image_id='../x'), dict(classes='water', schema='../../x'), dict(classes='water', k=0), dict(classes='water', k=1001), dict(classes='water', k=1e300), dict(classes='water', k='many'), dict(classes='nope'), dict(classes='('*60+'water'),
    dict(classes='water', where='polygon(/etc/passwd.json)'), dict(classes='water', where='not polygon("a.geojson")'), dict(classes='water', where='polygon("POLYGON((0 0,1 0,1 1,0 0))", x.json)'), dict(classes='water', where='nope>1'), dict(classes='water', where='x'*2001),
    dict(classes='water', filters=dict(polygon='area.geojson')), dict(classes='water', filters=dict(polygon=dict(type='FeatureCollection', features=[]))), dict(classes='water', filters=dict(box=[0,0,1])), dict(classes='water', filters=dict(box=[0,0,1,float('nan')])),
    dict(classes='water', filters=dict(polygon=dict(type='Polygon', coordinates=[[[0,0],[1,0],[1,1],[0,0]]]*501))), dict(classes='water', filters=dict(polygon=dict(type='Polygon', coordinates=[[[i*1e-4,i*1e-4] for i in range(1500)] for _ in range(3)]))),
    dict(classes='water', filters=dict(since='2020-99-99')), dict(classes='water', filters=dict(catalog_id='a/b')), dict(classes='water', filters=dict(unknown=1)), dict(classes='water', date='2020-01-01'), dict(verdicts=dict(query='nobody asked')), dict(verdicts={}),
    dict(like=['Z33-03111112303000000_A.jpg']*201), dict(classes='water', filters=dict(apart_m=100))])
def test_questions_that_are_refused(server, q):
    r = server.http.post('/api/search', content=json.dumps(q), headers={'content-type':'application/json'})
    assert r.status_code in (400,404), r.text
    assert r.headers['content-type'].startswith('application/json') and set(r.json()['error'])=={'code','message'} and '/served' not in r.text and str(ROOT) not in r.text

@pytest.mark.parametrize('body', [b'{', b'[]', b'null', b'"x"', b'['*100_000, b'{"classes":'*50_000, b'\xff\xfe', b'{"classes":"\\ud800"}', b'{"classes":"water","k":'+b'9'*5000+b'}', b'{"classes":"water","k":NaN}'])
def test_bodies_that_are_no_question(server, body):
    assert server.http.post('/api/search', content=body, headers={'content-type':'application/json'}).status_code==400
    assert server.get('/health').status_code==200

def test_other_content_types_are_no_questions(server):
    assert server.http.post('/api/search', content=b'{"classes":"water"}', headers={'content-type':'text/plain'}).status_code==400
    assert server.http.post('/api/search', content=b'{"classes":"water"}').status_code==400

# ---- pictures from outside

def png(width, height, data=b'')->bytes:
    "A PNG that claims a size"
    def chunk(kind, body): return struct.pack('>I', len(body))+kind+body+struct.pack('>I', zlib.crc32(kind+body))
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))+chunk(b'IDAT', data or zlib.compress(b'\0'*100))+chunk(b'IEND', b'')

def picture(w=200, h=150, kind='PNG', **kw)->bytes:
    Image.effect_noise((w,h), 60).convert('RGB').save(out := io.BytesIO(), kind, **kw)
    return out.getvalue()

def send(server, data, name='x.png', field='file', **kw): return server.post('/api/upload', files={field:(name, data)}, **kw)

def test_a_picture_is_a_question(server, chip):
    own = server.get(f"/api/chip/{chip['chip']}/image").content
    up = send(server, own, '../../etc/passwd').json()
    assert (up['width'], up['height'])==(512,512) and up['thumb'].startswith('data:image/jpeg;base64,')
    r = ask(server, image_id=up['image_id'], k=3).json()
    assert chip['chip'] in [f['properties']['chip'] for f in r['features'][:2]] and r['features'][0]['properties']['score']>.9
    assert ask(server, like=[{'image_id':up['image_id']}], k=3).json()['features'][0]['id']==r['features'][0]['id']
    assert error(ask(server, image_id='0'*32))==(404,'not_found')
    for kind in ('JPEG','WEBP','TIFF','GIF','BMP'): assert send(server, picture(kind=kind)).status_code==200, kind

def test_hostile_uploads(server):
    had = server.memory()
    cases = {'not a picture':b'hello', 'empty':b'', 'html':b'<html><script>alert(1)</script>', 'svg':b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'pdf':b'%PDF-1.4', 'cut off':picture(600,600)[:5000], 'broken':picture()[:60]+b'\0'*500,
        'eps':b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n', 'tiny':picture(4,4)}
    for what,data in cases.items(): assert error(send(server, data))==(400,'bad_input'), what
    for size in ((60_000,60_000), (2**31-1,2**31-1), (8000,7000)): assert error(send(server, png(*size)))==(413,'too_large'), size
    bomb = png(7000, 7000, zlib.compress(b'\0'*(7000*3+1)*7000, 1)) # 147 MB of black in a few hundred kB: within the limit, so it is read, and let go
    assert send(server, bomb).status_code==200
    polyglot = picture(kind='GIF')+b'<script>alert(1)</script>'
    up = send(server, polyglot).json()
    assert 'script' not in json.dumps(up)
    assert server.memory()-had<600e6

def test_uploads_that_are_too_long_are_cut_off_while_they_come(server):
    for path,kind,n in (('upload','multipart/form-data; boundary=b',21*2**20), ('search','application/json',2**20+10)): # announced: not a byte of it is read
        told = server.raw(f'POST /api/{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {n}\r\n\r\n'.encode())
        assert b' 413 ' in told.split(b'\r\n')[0] and b'"too_large"' in told
    def endless():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(400): yield b'\0'*2**17 # 50 MB, not announced
    try: r = server.post('/api/upload', content=endless(), headers={'content-type':'multipart/form-data; boundary=b'})
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError): pass # the connection was closed on us
    else: assert error(r)==(413,'too_large')
    assert server.get('/health').status_code==200

@pytest.mark.parametrize('kw', [dict(data={'file':'text'}), dict(content=b'x', headers={'content-type':'multipart/form-data'}), dict(content=b'--b\r\n\r\nx', headers={'content-type':'multipart/form-data; boundary=b'}), dict(json={}), dict(content=b''),
    dict(files=[('file', ('a', b'x')), ('file', ('b', b'y'))]), dict(files={'other':('a', b'x')}), dict(content=b'--b\r\n'+b'X: y\r\n'*100_000, headers={'content-type':'multipart/form-data; boundary=b'})])
def test_forms_that_are_none(server, kw): assert error(server.post('/api/upload', **kw))==(400,'bad_input')

# ---- verdicts

def test_verdicts_are_kept_found_and_searched_from(server, chip, root):
    a, b, c = [f['id'] for f in ask(server, classes='water', k=3).json()['features']]
    text = '<img src=x onerror=alert(1)> pond'
    for name,said in ((a,'yes'), (b,'no'), (c,'unsure')): assert server.post('/api/verdicts', json=dict(chip=name, query=text, verdict=said, note='=1+1')).json()['verdict']==said
    got = server.get('/api/verdicts', params=dict(text='POND')).json()
    assert got['total']==3 and got['verdicts'][-1]['query']==text and [v['verdict'] for v in got['verdicts']]==['unsure','no','yes']
    r = ask(server, verdicts=dict(query=text), k=5).json()
    assert [o['name'] for o in r['query']['like']]==[a] and [o['name'] for o in r['query']['unlike']]==[b]
    for f,kind in dict(geojson='application/geo+json', csv='text/csv', jsonl='application/x-ndjson').items():
        e = server.get('/api/verdicts/export', params=dict(format=f, query=text))
        assert e.headers['content-type'].startswith(kind) and 'attachment' in e.headers['content-disposition'] and e.text.count(a)==1
    assert "'=1+1" in server.get('/api/verdicts/export?format=csv').text
    assert server.http.delete(f"/api/verdicts/{got['verdicts'][0]['id']}").status_code==200
    assert error(server.http.delete(f"/api/verdicts/{got['verdicts'][0]['id']}"))==(404,'not_found') and server.get('/api/verdicts').json()['total']==2
    assert len((root/'verdicts/land/main.jsonl').read_text().splitlines())==4

@pytest.mark.parametrize('v', [dict(verdict='maybe', query='x'), dict(verdict='yes'), dict(verdict='yes', query='x', **{'class':'water'}), dict(verdict='yes', query='x'*201), dict(verdict='yes', query='x', note='y'*501), dict(verdict='yes', query='x', chip='../x'),
    dict(verdict='yes', query='x', schema='../..'), dict(verdict='yes', query='x', collection='nope'), dict(verdict='yes', query='x', chip='Z33-03111112303000000_NOBODY.jpg'), dict(verdict='yes', query=' \n ')])
def test_verdicts_that_are_none(server, chip, v): assert server.post('/api/verdicts', json=dict(chip=chip['chip'])|v).status_code in (400,404)

# ---- who may ask

def test_foreign_names_and_pages_are_refused(server, chip):
    for host in ('evil.com', 'localhost.evil.com', '127.0.0.1.evil.com', f'evil.com:{server.port}', '192.168.0.1', '[::2]'): assert error(server.get('/api/config', headers={'host':host}))==(403,'forbidden'), host
    for host in ('localhost', 'LOCALHOST:1', '127.0.0.1:80', '[::1]:8080'): assert server.get('/health', headers={'host':host}).status_code==200
    for host in ('a b', '', 'x/y', '<script>'): assert error(server.get('/health', headers={'host':host}))==(400,'bad_input')
    v = dict(chip=chip['chip'], query='csrf', verdict='yes')
    for h in ({'origin':'http://evil.com'}, {'origin':'null'}, {'sec-fetch-site':'cross-site'}, {'sec-fetch-site':'same-site'}, {'origin':f'http://127.0.0.1:{server.port+1}'}):
        assert error(server.post('/api/verdicts', json=v, headers=h))==(403,'forbidden'), h
    assert server.post('/api/verdicts', json=v, headers={'origin':server.url.rstrip('/'), 'sec-fetch-site':'same-origin'}).status_code==200
    r = server.http.options('/api/search', headers={'origin':'http://evil.com', 'access-control-request-method':'POST'})
    assert not [h for h in server.get('/api/config', headers={'origin':'http://evil.com'}).headers if h.startswith('access-control')] and r.status_code==405

def test_headers_that_keep_a_browser_from_guessing(server, chip):
    for path in ('/', '/api/config', '/tiles/0/0/0.png', '/nope', '/docs', '/metrics', f"/api/chip/{chip['chip']}/image"):
        h = server.get(path).headers
        assert h['x-content-type-options']=='nosniff' and h['referrer-policy']=='no-referrer' and 'frame-ancestors' in h['content-security-policy'] and 'server' not in h, path
        assert "default-src 'self'" in h['content-security-policy'] if path in ('/','/docs') else "default-src 'none'" in h['content-security-policy']
    first = server.get('/')
    again = server.get('/', headers={'if-none-match':first.headers['etag']})
    assert again.status_code==304 and again.headers['content-security-policy']==first.headers['content-security-policy'] # or a page that is loaded again is blank
    page = server.get('/docs').text
    assert '<script' not in page and 'http://' not in page and 'https://' not in page

@pytest.mark.parametrize('name', ['../../etc/passwd', '..%2f..%2fetc%2fpasswd', '%2e%2e/%2e%2e/etc/passwd', '/etc/passwd', '%00', '....//etc/passwd', '\\..\\x', 'C:/x', '~root', 'a'*3000, '%ff%fe', '..%252fetc', "';ls", '<script>'])
def test_no_name_is_a_path(server, name):
    for path in (f'/{name}', f'/assets/{name}', f'/api/chip/{name}', f'/api/chip/{name}/image', f'/api/labels/{name}', f'/tiles/{name}/1/1.png', f'/tiles/1/1/{name}', f'/api/verdicts/{name}'):
        r = server.raw(b'GET '+path.replace(' ','%20').encode()+b' HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n')
        assert r.split()[1] in (b'400',b'404',b'405',b'200') and b'root:' not in r and b'<script>' not in r, (path, r[:300])
        if r.split()[1]==b'200': assert path in ('//etc/passwd',) or b'image/' in r or b'text/html' in r
    for where in ('schema','collection'): assert server.get('/api/examples', params={where:name}).status_code in (400,404)

@pytest.fixture(scope='module')
def locked(root):
    "A server with a token and a log, that waits for nobody, and has nothing that needs a network"
    p = Process(root, token='correct horse battery', schemas=[], verdicts=False, access_log=True, limits=dict(PATIENT, head_seconds=4., body_seconds=4.))
    yield p
    p.stop()

@pytest.fixture(scope='module')
def known(locked):
    "Who knows its token"
    with client(locked.url) as c:
        c.headers['authorization'] = 'Bearer correct horse battery'
        yield c

def test_a_token(locked):
    p = locked
    assert '?token=<token>' in p.lines[-1] and 'horse' not in ''.join(p.lines)
    assert error(p.get('/api/config'))==(401,'unauthorized') and error(p.get('/tiles/0/0/0.png'))==(401,'unauthorized') and error(p.get('/openapi.json'))==(401,'unauthorized')
    assert p.get('/health').json()['version'] is None if 'version' in p.get('/health').json() else p.get('/health').json()=={'status':'ok'}
    door = p.get('/')
    assert door.status_code==401 and 'name="token"' in door.text
    assert p.get('/?token=wrong').status_code==401 and 'set-cookie' not in p.get('/?token=wrong').headers
    assert p.get('/api/config', headers={'authorization':'Bearer correct horse battery'}).status_code==200
    assert p.get('/api/config', headers={'host':'maps.example.org', 'authorization':'Bearer correct horse battery'}).status_code==200
    assert p.get('/api/config', auth=('anybody','correct horse battery')).status_code==200
    assert p.get('/api/config?token=correct horse battery').status_code==401
    r = p.get('/?token=correct horse battery')
    assert r.status_code==303 and r.headers['location']=='./' and 'horse' not in str(r.headers)
    assert all(w in r.headers['set-cookie'] for w in ('HttpOnly','SameSite=Strict')) and 'Path' not in r.headers['set-cookie']
    assert p.get('/api/config').status_code==200 and 'private' in p.get('/tiles/0/0/0.png').headers['cache-control'] and p.get('/?token=correct horse battery').status_code==303 # the cookie is known now
    assert p.http.post('/api/search', json=dict(classes='x'), headers={'origin':'http://evil.com'}).status_code==403
    assert error(p.post('/api/search', json=dict(classes='x')))==(404,'not_found') and 'libtorch' not in p.libraries()
    m = p.get('/metrics').text
    assert 'horse' not in m
    p.get('/a%0a200 GET /forged')
    until(lambda: 'forged' in p.errors())
    log = p.errors()
    assert 'horse' not in log and 'GET /api/config' in log and '\n200 GET /forged' not in log and 'Traceback' not in log

def test_open_to_the_network_only_with_a_token(root):
    from imagesim.infra import InputError
    from imagesim.serve import run_server
    for options,word in ((dict(host='0.0.0.0'),'there is no token'), (dict(host='::'),'there is no token'), (dict(host='10.0.0.1', token='1234567'),'8 or more'), (dict(host='no.such.name.invalid', token='12345678'),'address of this machine')):
        with pytest.raises(InputError, match=word): run_server(root/'ard', port=0, **options)

def test_a_port_that_is_taken(root, server):
    from imagesim.infra import InputError
    from imagesim.serve import run_server
    with pytest.raises(InputError, match='taken by another program'): run_server(root/'ard', port=server.port)

# ---- what it outlives

def half_open(server, data:bytes, n:int):
    out = []
    for _ in range(n):
        s = socket.create_connection(('127.0.0.1', server.port), timeout=LONG)
        s.sendall(data)
        out.append(s)
    return out

def ended(sockets)->list[bytes]:
    "What each connection got before the server closed it"
    out = []
    for s in sockets:
        got = b''
        try:
            while part := s.recv(65536): got += part
        except ConnectionResetError: pass
        s.close()
        out.append(got)
    return out

def test_half_open_connections_do_not_stop_it(locked, known, chip):
    x,y = tile_of(chip)
    heads = half_open(locked, b'GET /api/config HTTP/1.1\r\nHost: localhost\r\nX-A: ', 120)+half_open(locked, b'', 40)+half_open(locked, b'G', 40)
    bodies = half_open(locked, b'POST /api/search HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer correct horse battery\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"classes":', 100)
    for i in range(10): assert known.get(f'/tiles/19/{x+i}/{y}.webp').status_code==200 and known.get('/api/config').status_code==200
    assert ended(heads)==[b'']*200 # a request that never became one gets no answer, and is not waited for
    answers = ended(bodies)
    assert all(b' 408 ' in a.split(b'\r\n')[0] for a in answers) and b'to arrive' in answers[0]
    assert known.get('/health').status_code==200

def test_nonsense_on_the_wire(locked, known):
    wire = [b'\x16\x03\x01\x02\x00', b'GET / HTTP/9.9\r\n\r\n', b'GET /\r\n\r\n', b'A'*100_000, b'GET / HTTP/1.1\r\nHost: localhost\r\n'+b'X: '+b'y'*100_000+b'\r\n\r\n', b'GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n',
        b'POST /api/search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n', b'GET /'+b'a'*60_000+b' HTTP/1.1\r\nHost: localhost\r\n\r\n', b'GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n',
        b'GET ws://localhost/ HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n']
    def say(data):
        try: return locked.raw(data)
        except (ConnectionResetError, BrokenPipeError): return b''
    with ThreadPoolExecutor(len(wire)) as pool: answers = list(pool.map(say, wire))
    for data,answer in zip(wire, answers):
        assert not answer or answer.split()[1] in (b'400',b'401',b'404',b'408'), (data[:60], answer[:200])
    assert known.get('/health').status_code==200

def test_who_does_not_read_costs_little(server):
    request = b'GET /api/grid?bbox=-180,-85,180,85&level=17 HTTP/1.1\r\nHost: localhost\r\n\r\n'
    deaf = half_open(server, request*20, 10) # 20 answers of some 400 kB each are waiting, and nobody takes them
    assert server.get('/api/grid?bbox=-180,-85,180,85&level=17').status_code==200
    for s in deaf: s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.close()
    assert server.get('/health').status_code==200

def count(server, name:str)->float:
    "Add up a counter"
    return sum(float(line.rsplit(' ', 1)[1]) for line in httpx.get(f'{server.url}metrics', timeout=LONG).text.splitlines() if line.startswith(name))

def test_full_queues_answer_at_once_and_who_left_is_forgotten(root, chip, tmp_path):
    from imagesim.serve import Limits, Server, create_app
    x,y = tile_of(chip, 17)
    app = create_app(root/'ard', [], data_root=str(root), verdicts=False, cache=tmp_path/'cache', cache_bytes=100_000, limits=Limits(**PATIENT, tile_threads=1, tile_queue=2))
    with Server(app) as s:
        go, gate = threading.Event(), app.state.gates['tiles']
        def tile(i, ext='png'): return httpx.get(f'{s.url}tiles/17/{x+i%3}/{y+i//3}.{ext}?size=512', timeout=LONG)
        try:
            for _ in range(2): gate.submit(go.wait) # the thread and a chair are taken
            with socket.create_connection(('127.0.0.1', s.port)) as left:
                left.sendall(f'GET /tiles/17/{x}/{y}.png?size=512 HTTP/1.1\r\nHost: localhost\r\n\r\n'.encode())
                until(lambda: gate.pending==3) # the last chair
                busy = tile(0)
                assert busy.headers['retry-after']=='1' and error(busy)==(503,'busy')
                assert httpx.get(f'{s.url}api/config', timeout=LONG).status_code==200 # other work goes on
            until(lambda: count(s, 'imagesim_requests_total{method="GET",route="/tiles/{z}/{x}/{y}.{ext}",status="499"}')==1)
        finally: go.set()
        until(lambda: gate.pending==0)
        assert count(s, 'imagesim_tiles_total')==0 # nothing was made for the one who left
        answers = [tile(i) for i in range(6)]
        again = tile(5)
        assert {r.status_code for r in answers}=={200} and again.content==answers[5].content and count(s, 'imagesim_tiles_total{source="cache"}')==1
    files = [p for p in (tmp_path/'cache').rglob('*') if p.is_file()]
    assert files and sum(p.stat().st_size for p in files)<=100_000 and all(re.fullmatch('[0-9a-f]{62}', p.name) for p in files)

def test_metrics_count_routes_and_not_addresses(server):
    for i in range(30): server.get(f'/nothing/{i}'); server.get(f'/api/chip/Z33-03111112303000{i:03o}_X')
    lines = [line for line in server.get('/metrics').text.splitlines() if line.startswith('imagesim_requests_total')]
    routes = {re.search('route="([^"]*)"', line)[1] for line in lines}
    assert routes<={'none', '/', '/docs', '/openapi.json', '/{name}', '/assets/{name:path}', *server.get('/openapi.json').json()['paths']}
    assert {re.search('method="([^"]*)"', line)[1] for line in lines}<={'GET','POST','HEAD','DELETE','OPTIONS','PUT','other'}
    assert count(server, 'imagesim_requests_total{method="GET",route="none",status="404"}')>=30

def test_a_broken_tile_and_a_new_generation(root, server, chip, tmp_path):
    from imagesim.serve import Limits, Server, create_app
    from imagesim.similarity import remove_embeddings
    shutil.copytree(root/'ard', tmp_path/'ard'); shutil.copytree(root/'schemas', tmp_path/'schemas')
    tile = next(tmp_path.glob('ard/*/*/2021-08-22/*-visual.tif'))
    data = bytearray(tile.read_bytes())
    running = Server(create_app(tmp_path/'ard', [tmp_path/'schemas/land'], data_root=str(tmp_path), chips=root/'chips', labels=root/'labels', limits=Limits(**PATIENT)))
    with running, client(running.url) as p:
        x,y = tile_of(chip)
        good = p.get(f'/tiles/19/{x}/{y}.png?on=2021-08-22')
        other = tmp_path/'other.tif'
        other.write_bytes(data[:len(data)//3]); os.replace(other, tile) # cut off
        os.utime(tile, (1,1))
        bad = [p.get(f'/tiles/19/{x+i}/{y}.png?on=2021-08-22') for i in range(-2,3)]
        assert all(r.status_code==200 for r in bad) and good.status_code==200
        assert any(r.headers['cache-control']=='no-store' for r in bad)
        faults = p.get('/health').json()['faults']
        assert faults and str(tmp_path) not in json.dumps(faults) and 'cut off' in faults[0]
        on = {a['date']:a['catalog_id'] for a in p.get('/api/config').json()['acquisitions']}
        newest = p.get(f"/api/chip/{chip['place']}_{on['2021-08-22']}.jpg/image")
        assert newest.status_code==500 and newest.json()['error']['code']=='internal' and str(tmp_path) not in newest.text
        assert p.get(f'/tiles/19/{x}/{y}.png?on=2019-05-09').status_code==200 and ask(p, classes='water', k=3).status_code==200

        was = p.get('/api/config').json()['schemas'][0]['collections'][0]
        remove_embeddings(tmp_path/'schemas/land', catalog_ids=on['2019-05-09'])
        def now(): return p.get('/api/config').json()['schemas'][0]['collections'][0]
        until(lambda: now()['generation']!=was['generation'])
        assert now()['generation']==2 and now()['chips']==9 and ask(p, classes='water', k=20).json()['generation']==2
        (tmp_path/'schemas/land/collections/main/generations/00000003.json').write_text('{}')
        def noticed():
            p.get('/api/examples')
            return any('main' in f for f in p.get('/health').json()['faults'])
        until(noticed)
        assert ask(p, classes='water', k=20).json()['generation']==2

def test_it_ends_when_it_is_told_to(locked, chip):
    p = locked
    assert 'libtorch' not in p.libraries() # only where it is asked for
    x,y = tile_of(chip, 14)
    open_ones = half_open(p, b'GET / HTTP/1.1\r\nHost: loc', 10)+half_open(p, b'', 10)+half_open(p, b'POST /api/search HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer correct horse battery\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{', 10)
    asking = [threading.Thread(target=lambda i=i: ended(half_open(p, f'GET /tiles/16/{x*4+i%4}/{y*4+i//4}.png?size=512 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer correct horse battery\r\n\r\n'.encode()*20, 1))) for i in range(8)]
    for t in asking: t.start()
    assert p.get('/health').status_code==200
    assert p.stop(signal.SIGINT)==0 # or it is still there after minutes, which raises
    for t in asking: t.join()
    for s in open_ones: s.close()
    assert 'Traceback' not in p.errors()
    with pytest.raises(ConnectionRefusedError): socket.create_connection(('127.0.0.1', p.port))

# ---- behind a proxy, in a notebook

@pytest.fixture(scope='module')
def proxy(server):
    "A proxy as Jupyter's: /proxy/PORT/ without its prefix, /proxy/absolute/PORT/ with it; the host stays that of the browser"
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def do_GET(self):
            m = re.match(r'/user/ana/proxy/(absolute/)?(\d+)(/.*)', self.path)
            body = self.rfile.read(int(self.headers.get('content-length') or 0))
            headers = {k:v for k,v in self.headers.items()}
            if not m[1]: headers['X-Forwarded-Prefix'] = f'/user/ana/proxy/{m[2]}'
            with httpx.Client(timeout=LONG) as c: r = c.request(self.command, f'http://127.0.0.1:{m[2]}'+(self.path if m[1] else m[3]), headers=headers, content=body)
            self.send_response(r.status_code)
            for k,v in r.headers.multi_items():
                if k not in ('content-encoding','content-length','transfer-encoding','connection'): self.send_header(k, v)
            self.send_header('content-length', str(len(r.content)))
            self.end_headers()
            self.wfile.write(r.content)
        do_POST = do_GET
        def log_message(self, *a): pass
    p = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=p.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{p.server_port}'
    p.shutdown()

def test_it_works_under_a_prefix(root, server, proxy, chip):
    import xml.etree.ElementTree as ET
    from urllib.parse import urljoin
    from imagesim.infra import InputError
    from imagesim.serve import Server, create_app
    x,y = tile_of(chip)
    def made(root_path):
        while True:
            with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
            app = create_app(root/'ard', ['land'], data_root=str(root), token='correct horse battery', verdicts=False, root_path=root_path.format(port))
            try: return Server(app, port=port)
            except InputError: pass # somebody else was quicker
    for way,root_path in (('', ''), ('absolute/', ''), ('absolute/', '/user/ana/proxy/absolute/{}')):
        with made(root_path) as running:
            base = f'{proxy}/user/ana/proxy/{way}{running.port}/'
            with httpx.Client(timeout=LONG, limits=httpx.Limits(max_keepalive_connections=0), headers={'host':'jupyter.example.org:8888'}) as c:
                r = c.get(base+'?token=correct horse battery')
                assert r.status_code==303 and urljoin(base, r.headers['location'])==base
                c.headers['cookie'] = r.headers['set-cookie'].partition(';')[0]
                assert c.get(base).status_code==200
                config = c.get(urljoin(base, 'api/config')).json()
                tile = c.get(urljoin(base, config['tiles']['url'].format(z=19, x=x, y=y)))
                assert tile.status_code==200 and tile.headers['content-type']=='image/webp'
                assert c.post(urljoin(base, 'api/search'), json=dict(classes='water', k=1), headers={'origin':'http://jupyter.example.org:8888'}).status_code==200
                assert c.post(urljoin(base, 'api/search'), json=dict(classes='water', k=1), headers={'origin':'http://evil.org'}).status_code==403
                outside = 'http://jupyter.example.org:8888'+base.removeprefix(proxy)
                assert c.get(urljoin(base, 'tilejson.json')).json()['tiles'][0].startswith(outside+'tiles/')
                assert ET.fromstring(c.get(urljoin(base, 'tms/1.0.0/')).content).find('TileSets')[3].get('href')==outside+'tms/1.0.0/3'

def test_a_forwarded_prefix_is_not_believed_blindly(server):
    for prefix in ('//evil.com', 'javascript:x', '/a/../b', '/a"><script>', '\\evil'):
        assert server.get('/tilejson.json', headers={'x-forwarded-prefix':prefix}).json()['tiles'][0].startswith(server.url+'tiles/'), prefix

def test_show(root, server, monkeypatch):
    from imagesim.serve import show
    for k in ('JUPYTERHUB_SERVICE_PREFIX','JUPYTER_SERVER_URL','JPY_PARENT_PID','JPY_SESSION_NAME'): monkeypatch.delenv(k, raising=False)
    args = dict(ard=root/'ard', schema=root/'schemas/land', data_root=str(root), verdicts=False)
    a = show(**args)
    try:
        assert show(**args, height=300) is a and f'src="http://127.0.0.1:{a.server.port}/"' in a._repr_html_() and 'height="300"' in a._repr_html_()
        r = httpx.get(a.server.url, timeout=LONG)
        assert r.status_code==200 and "frame-ancestors 'self' http://localhost:*" in r.headers['content-security-policy']
        monkeypatch.setenv('JUPYTERHUB_SERVICE_PREFIX', '/user/ana/')
        b = show(**args, title='other')
        path = re.search('src="([^"]+)"', b._repr_html_())[1]
        assert re.fullmatch(rf'/user/ana/proxy/{b.server.port}/\?key=[\w-]{{30,}}', path)
        assert httpx.get(b.server.url+'api/config', timeout=LONG).status_code==401
        b.stop()
    finally: a.stop()
    with pytest.raises(httpx.ConnectError): httpx.get(a.server.url)

# ---- everything at once

def test_every_route_from_its_description(server, chip):
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings, strategies as st
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance
    checks, seen = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance], {}
    def known(case, pick):
        "Put names that are known here into some of the questions, so that they get further"
        for k,v in dict(chip=chip['chip'], place=chip['place']).items():
            if k in (case.path_parameters or {}): case.path_parameters[k] = v
        for d in (case.query, case.body):
            if isinstance(d, dict):
                for k in ('schema','collection'): d.pop(k, None)
                if 'class' in d: d['class'] = pick(CLASSES)
        if isinstance(case.body, dict) and 'search' in case.path:
            for k in ('where','date','image_id','verdicts','lonlat','chip'): case.body.pop(k, None)
            case.body |= dict(classes=pick(['water', 'forest and not water']), like=[chip['chip']], unlike=pick([[], [{'lonlat':[chip['lon'],chip['lat']]}]]))
        elif isinstance(case.body, dict) and 'chip' in case.body: case.body['chip'] = chip['chip']
    for op in schemathesis.openapi.from_url(server.url+'openapi.json').get_all_operations():
        op = op.ok()
        params = bool(op.path_parameters or op.query or op.body)
        for mode in ('POSITIVE','KNOWN','NEGATIVE') if params else ('POSITIVE',):
            @settings(max_examples=6, derandomize=True, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
            @given(op.as_strategy(generation_mode=schemathesis.GenerationMode['NEGATIVE' if mode=='NEGATIVE' else 'POSITIVE']), st.data())
            def run(case, data):
                if mode=='KNOWN': known(case, lambda o: data.draw(st.sampled_from(o)))
                r = case.call(base_url=server.url.rstrip('/'), timeout=LONG)
                seen.setdefault((op.label, mode), set()).add(r.status_code)
                case.validate_response(r, checks=checks)
            run()
    assert len({label for label,_ in seen})==sum(map(len, server.get('/openapi.json').json()['paths'].values()))>20 and all(200 in seen[label,'KNOWN'] for label in ('POST /api/search','GET /api/chip/{chip}','GET /api/chip/{chip}/heat','POST /api/verdicts','GET /api/grid')), seen

def test_a_mix_of_everything(server, chip):
    x, y = tile_of(chip, 16)
    names = [f['id'] for f in ask(server, classes='water', k=18).json()['features']]
    def one(n):
        rng, seen = random.Random(n), Counter()
        with client(server.url) as c:
            for _ in range(70):
                kind, z = rng.randrange(10), rng.randrange(12, 20)
                if kind<5: r = c.get(f'/tiles/{z}/{(x<<4>>(20-z))+rng.randrange(3)}/{(y<<4>>(20-z))+rng.randrange(3)}.{rng.choice(["png","webp","jpg"])}')
                elif kind<7: r = c.post('/api/search', json=dict(like=rng.sample(names, rng.randrange(1,4)), k=10))
                elif kind<8: r = c.get(f'/api/chip/{rng.choice(names)}')
                elif kind<9: r = c.get(f'/api/chip/{rng.choice(names)}/image?px={rng.choice([64,256,512])}')
                else: r = c.get('/api/config') if rng.random()<.5 else c.get('/api/nope')
                seen[r.status_code] += 1
        return seen
    had = server.memory()
    with ThreadPoolExecutor(6) as pool: seen = sum(pool.map(one, range(6)), Counter())
    assert set(seen)=={200,404} and seen.total()==420
    assert server.memory()-had<350e6 # the cache of decoded pixels may fill, up to 256 MB; nothing else grows
