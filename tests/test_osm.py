"""OpenStreetMap for every cell, end to end: real servers on this machine, real extracts, killed runs, hostile maps."""
import gzip, json, os, re, signal, subprocess, sys, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from imagesim.ard import Cell, covering_cells
from imagesim.element import OSM_FILE, osm_path, osm_state, read_elements
from imagesim.infra import CorruptError, InputError, StorageError, list_files
from imagesim.osm import FAILED_FILE, OsmPlan, cell_state, check_fair, fetch_osm, fetch_osm_by_quadkey, osm_cells, osm_status, plan_osm, zone_tags
from imagesim.overpass import QueryError
from imagesim.synth import make_delivery
from conftest import ROOT

KINDS = 'nodes', 'ways', 'relations'

class Answering(BaseHTTPRequestHandler):
    "Answers with what the server was told to"
    def do_GET(self): self.send(404, b'', 'text/plain')
    def do_POST(self):
        self.rfile.read(int(self.headers['Content-Length']))
        self.server.asked += 1
        status, body, kind = self.server.answer(self.server.asked)
        self.send(status, body, kind)
    def send(self, status, body, kind):
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass

@pytest.fixture
def overpass():
    "Start an HTTP server that answers as `answer(n)` says: (status, body, content type)"
    servers = []
    def start(answer):
        s = ThreadingHTTPServer(('127.0.0.1', 0), Answering)
        s.asked, s.answer = 0, answer
        threading.Thread(target=s.serve_forever, daemon=True).start()
        servers.append(s)
        s.url = f'http://127.0.0.1:{s.server_port}/api/interpreter'
        return s
    yield start
    for s in servers: s.shutdown()

@pytest.fixture(scope='session')
def delivered(tmp_path_factory):
    return make_delivery(tmp_path_factory.mktemp('osm'), size=3, dates=1, cells=2)

def folders(root, cells):
    "A delivery as far as this stage looks at it"
    for c in cells: Path(root, f'{c.zone:02d}', c.quadkey).mkdir(parents=True, exist_ok=True)
    return str(root)

def json_answer(body): return lambda n: (200, body, 'application/json')

# -- the users' own lines

def test_the_lines_of_the_guide(delivered, overpass, tmp_path):
    server = overpass(json_answer(Path(delivered.overpass).read_bytes()))
    folders(tmp_path/'ard', delivered_cells(delivered))
    code = 'from imagesim.scripts.local.osm import fetch_osm_by_quadkey\nfrom imagesim.scripts.constants import DATA_PATH\n' \
           'from imagesim.scripts.chip import get_cog_path_from_chip\n' \
           'node_tags, way_tags, relation_tags = fetch_osm_by_quadkey(33, DATA_PATH)\n' \
           "assert way_tags['highway','residential']>0 and relation_tags['type','multipolygon']>0, way_tags\n"
    env = dict(os.environ, PYTHONPATH=str(ROOT), IMAGESIM_DATA_ROOT=str(tmp_path), IMAGESIM_OVERPASS=server.url, XDG_CACHE_HOME=str(tmp_path/'cache'))
    p = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert p.returncode==0, p.stderr
    assert [cell_state(c, tmp_path/'ard').state for c in delivered_cells(delivered)]==['done']*2

def delivered_cells(d): return osm_cells(33, d.ard)

# -- what a server answers becomes the state of a cell

@pytest.mark.parametrize('name,state', [('empty_sea.json.gz','empty'), ('vaduz_1km_body_recurse.json.gz','empty'), ('partial_with_remark_200.json','failed'),
    ('errors/dispatcher_off_504.html','failed'), ('errors/duplicate_query_200.html','failed'), ('errors/oom_remark_200.json','failed'),
    ('errors/third_429.txt','failed'), ('errors/timeout_remark_200.json','failed'), ('errors/too_big_504_504.html','failed')])
def test_real_bodies_end_in_the_right_state(shared, overpass, tmp_path, name, state):
    path = shared/'overpass'/name
    body = gzip.decompress(path.read_bytes()) if name.endswith('.gz') else path.read_bytes()
    status = int(m[1]) if (m := re.search(r'_(\d{3})\.', name)) else 200
    cell = Cell.at(7.605, 43.605, 12) # off Monaco, where the empty answer is from; what other places answer is none of this cell's
    ard, waits = folders(tmp_path/'ard', [cell]), []
    server = overpass(lambda n: (status, body, 'application/json' if name.endswith(('.json','.gz')) else 'text/html'))
    run = fetch_osm(plan_osm(cell.zone, ard, endpoint=server.url), work_dir=tmp_path/'work', sleep=waits.append, rounds=2, tries=2)
    now = cell_state(cell, ard)
    assert now.state==state and run.exit_code==int(state=='failed')
    assert (now.state=='failed')==bool(now.reason) and not list(Path(ard).rglob('*.part'))
    if status==429: assert waits and min(waits)>29.9 # from the answer on
    if state=='failed':
        assert not Path(osm_path(ard, cell)).exists()
        fetch_osm(plan_osm(cell.zone, ard, endpoint=server.url), work_dir=tmp_path/'work', sleep=waits.append, rounds=2, tries=2)
        assert cell_state(cell, ard).attempts==2
        good = overpass(json_answer(gzip.decompress((shared/'overpass/empty_sea.json.gz').read_bytes())))
        fetch_osm(plan_osm(cell.zone, ard, endpoint=good.url), work_dir=tmp_path/'work')
        assert cell_state(cell, ard).state=='empty' and not Path(osm_path(ard, cell)).with_name(FAILED_FILE).exists()

def test_a_query_that_is_not_understood_stops_the_run(shared, overpass, tmp_path):
    server = overpass(lambda n: (400, (shared/'overpass/errors/syntax_400.html').read_bytes(), 'text/html'))
    cells = [Cell(33,'031111123030'), Cell(33,'031111123031'), Cell(33,'031111123032')]
    ard = folders(tmp_path, cells)
    with pytest.raises(QueryError, match='bug of imagesim'): fetch_osm(plan_osm(33, ard, endpoint=server.url), work_dir=tmp_path/'work', sleep=lambda s: None)
    assert server.asked==1 and {cell_state(c, ard).state for c in cells}=={'missing'}

def test_a_real_answer_lands_in_its_cell(shared, overpass, tmp_path):
    body = gzip.decompress((shared/'overpass/vaduz_1km_body_recurse.json.gz').read_bytes())
    cells = covering_cells(dict(type='Polygon', coordinates=[[(9.513,47.140),(9.529,47.140),(9.529,47.151),(9.513,47.151),(9.513,47.140)]]), 12)
    ard = folders(tmp_path/'ard', cells)
    zone = cells[0].zone
    fetch_osm(plan_osm(zone, ard, endpoint=overpass(json_answer(body)).url), work_dir=tmp_path/'work')
    mine = [c for c in cells if c.zone==zone]
    got = {k:{e['id'] for c in mine for e in read_elements(osm_path(ard, c))[k]} for k in KINDS}
    here = lambda n: 9.5145<n['lon']<9.5274 and 47.1414<n['lat']<47.1502
    sent = json.loads(body)['elements']
    nodes = {e['id'] for e in sent if e['type']=='node' and here(e)}
    assert nodes and nodes<=got['nodes']
    assert {e['id'] for e in sent if e['type']=='way' and nodes & set(e['nodes'])}<=got['ways']
    assert {e['id'] for e in sent if e['type']=='relation'}==got['relations']
    assert len(got['ways'])<sum(e['type']=='way' for e in sent) # members of routes and boundaries that lie elsewhere were sent too, and are not the cell's

# -- fairness

def test_more_than_twenty_cells_need_a_yes(imagesim, tmp_path):
    below = lambda c: [c] if c.level==12 else [d for q in c.children() for d in below(q)]
    ard = folders(tmp_path/'ard', below(Cell(33,'031111123'))[:21])
    p = imagesim('osm', '--ard-path', ard)
    assert p.returncode==2 and '21 cells' in p.stderr and 'extract' in p.stderr and '1 GB a day' in p.stderr
    p = imagesim('osm', '--ard-path', ard, '--dry-run')
    assert p.returncode==0 and '21 missing' in p.stdout and 'MB if all is city' in p.stdout
    assert not list_files(ard)
    p = imagesim('osm', 'status', '--ard-path', ard)
    assert p.returncode==0 and p.stdout.count('missing')==21

@pytest.mark.parametrize('args,words', [(('--source','no.osm.pbf'),'no such extract'), (('--endpoint','example'),'no web address'), (('--zone','34'),'no folder of a level-12 cell'),
                                        (('--source',''),'source is empty'), (('--source','s3://b/x.osm.pbf'),'copy it to this machine')])
def test_wrong_words_stop_before_work(imagesim, tmp_path, args, words):
    ard = folders(tmp_path/'ard', [Cell(33,'031111123030')])
    p = imagesim('osm', '--ard-path', ard, *args)
    assert p.returncode==2 and words in p.stderr and len(p.stderr.strip().splitlines())==1, p.stderr

# -- the same from both sources, wherever it is kept

def test_hostile_tags_survive_both_ways(delivered, overpass, tmp_path):
    import osmium
    evil = {'name':'<script>alert(1)</script>', "'; DROP TABLE labels; --":'x', '../../etc/passwd':'/a/../b\\c', 'note':'v'*255, 'ctrl':'a\x01\x07\tb\nc', 'rtl':'\u202eabc\u2066 שלום',
            'zero':'a\u200bb', 'emoji':'🏠', 'quote':'"\'`${x}%s{0}'}
    cell = Cell(33,'031111123030')
    lon, lat = cell.lonlat
    way = dict(type='way', id=5, version=1, timestamp='2020-01-01T00:00:00Z', nodes=[1,2,3,1], tags=evil)
    nodes = [dict(type='node', id=i, version=1, timestamp='2020-01-01T00:00:00Z', lon=round(lon+dx,7), lat=round(lat+dy,7)) for i,dx,dy in ((1,0,0), (2,.001,0), (3,0,.001))]
    body = json.dumps(dict(version=.6, osm3s=dict(timestamp_osm_base='2020-01-02T00:00:00Z'), elements=[*nodes, way])).encode()
    pbf = str(tmp_path/'evil.osm.pbf')
    with osmium.SimpleWriter(pbf) as w:
        for n in nodes: w.add_node(osmium.osm.mutable.Node(id=n['id'], version=1, timestamp=n['timestamp'], location=(n['lon'],n['lat'])))
        w.add_way(osmium.osm.mutable.Way(id=5, version=1, timestamp=way['timestamp'], nodes=way['nodes'], tags=evil))
    ard = folders(tmp_path/'ard', [cell])
    kw = dict(work_dir=tmp_path/'work')
    a = fetch_osm_by_quadkey(33, ard, endpoint=overpass(json_answer(body)).url, **kw)
    b = fetch_osm_by_quadkey(33, ard, source=pbf, osm_root=tmp_path/'b', **kw)
    assert a==b and a.ways==Counter(evil.items())
    way['tags'] = evil | {'note':'v'*10_000} # more than OSM or osmium admit, but a server may send it
    huge = json.dumps(dict(version=.6, osm3s=dict(timestamp_osm_base='2020-01-02T00:00:00Z'), elements=[*nodes, way])).encode()
    fetch_osm_by_quadkey(33, ard, endpoint=overpass(json_answer(huge)).url, osm_root=tmp_path/'c', **kw)
    assert read_elements(osm_path(tmp_path/'c', cell))['ways'][0]['tags']==way['tags']
    one, two = read_elements(osm_path(ard, cell)), read_elements(osm_path(tmp_path/'b', cell))
    assert one['ways'][0]['tags']==evil and all(one[k]==two[k] for k in KINDS)
    assert sorted(p.name for p in tmp_path.rglob('*') if p.is_file() and p.name[0]!='.')==['evil.osm.pbf', OSM_FILE, OSM_FILE, OSM_FILE]

def test_files_in_a_bucket(delivered, bucket, tmp_path):
    kw = dict(source=str(delivered.pbf), osm_root=f'{bucket}/osm')
    tags = fetch_osm_by_quadkey(33, delivered.ard, work_dir=tmp_path, **kw)
    assert tags.ways and set(osm_status(33, delivered.ard, f'{bucket}/osm').state)=={'done'}
    assert not plan_osm(33, delivered.ard, **kw).todo
    assert zone_tags(plan_osm(33, delivered.ard, **kw))==tags

def test_another_extract_makes_the_cells_again(delivered, tmp_path):
    import shutil
    ard, pbf = folders(tmp_path/'ard', delivered_cells(delivered)), str(tmp_path/'x.osm.pbf')
    shutil.copy(delivered.pbf, pbf)
    fetch_osm_by_quadkey(33, ard, source=pbf, work_dir=tmp_path/'work')
    assert not plan_osm(33, ard, source=pbf).todo and not plan_osm(33, ard).todo # a server is not asked for what is there
    os.utime(pbf, (1,1))
    assert len(plan_osm(33, ard, source=pbf).todo)==2

# -- killed

def test_killed_between_cells_loses_nothing(delivered, overpass, tmp_path):
    cells = [Cell(33, f'0311111230{a}{b}') for a in '12' for b in '0123']
    ard, body = folders(tmp_path/'ard', cells), Path(delivered.overpass).read_bytes()
    server = overpass(json_answer(body))
    cmd = [sys.executable, '-m', 'imagesim.cli', 'osm', '--ard-path', ard, '--endpoint', server.url, '--work-dir', str(tmp_path/'work')]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    p = subprocess.Popen(cmd, env=env, stdout=subprocess.DEVNULL)
    deadline = time.time()+60
    while len(list(Path(ard).rglob(OSM_FILE)))<3 and time.time()<deadline: time.sleep(.002)
    p.kill(); p.wait()
    there = sorted(Path(ard).rglob(OSM_FILE))
    assert 3<=len(there)<len(cells), 'the run was to be killed in the middle'
    before = {f:(f.stat().st_mtime_ns, osm_state(f)) for f in there} # each is whole
    asked = server.asked
    assert subprocess.run(cmd, env=env, stdout=subprocess.DEVNULL).returncode==0
    assert {cell_state(c, ard).state for c in cells}<={'done','empty'} and server.asked-asked<=len(cells)-len(there)
    assert all(f.stat().st_mtime_ns==t for f,(t,_) in before.items())
    assert {f.name for f in Path(ard).rglob('*') if f.is_file()}=={OSM_FILE}

def test_killed_while_it_reads_an_extract(shared, tmp_path):
    extract = shared/'osm/liechtenstein-2022.osm.pbf'
    cells = [c for c in covering_cells(dict(type='Polygon', coordinates=[[(9.47,47.05),(9.64,47.05),(9.64,47.27),(9.47,47.27),(9.47,47.05)]]), 12) if c.zone==32]
    ard = folders(tmp_path/'ard', cells)
    cmd = [sys.executable, '-m', 'imagesim.cli', 'osm', '--ard-path', ard, '--source', str(extract), '--work-dir', str(tmp_path/'work'), '--proc', '1']
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    p = subprocess.Popen(cmd, env=env, stdout=subprocess.DEVNULL)
    deadline = time.time()+120
    while len(list(Path(ard).rglob(OSM_FILE)))<2 and time.time()<deadline: time.sleep(.005)
    p.kill(); p.wait()
    there = {f:f.stat().st_mtime_ns for f in Path(ard).rglob(OSM_FILE)}
    assert 2<=len(there)<len(cells)
    for f in there: read_elements(f)
    assert subprocess.run(cmd, env=env, stdout=subprocess.DEVNULL).returncode==0
    assert all(f.stat().st_mtime_ns==t for f,t in there.items())
    assert not any(Path(tmp_path/'work').rglob('*.part')) and set(osm_status(32, ard).state)<={'done','empty'}

def test_a_cell_that_the_extract_does_not_reach_is_no_empty_cell(shared, tmp_path):
    ard = folders(tmp_path/'ard', [Cell.at(9.52,47.14,12), Cell.at(11.,48.,12)])
    run = fetch_osm(plan_osm(32, ard, source=str(shared/'osm/liechtenstein-2022.osm.pbf')), work_dir=tmp_path/'work')
    states = osm_status(32, ard)
    assert run.exit_code==1 and sorted(states.state)==['done','failed'] and 'does not cover' in states.reason[states.state=='failed'].iloc[0]

def test_a_damaged_note_is_still_a_failure(delivered, tmp_path):
    cell = delivered_cells(delivered)[0]
    note = Path(osm_path(tmp_path, cell)).with_name(FAILED_FILE)
    note.parent.mkdir(parents=True)
    note.write_text('{"attempts"')
    assert cell_state(cell, tmp_path).state=='failed'
    with pytest.raises(InputError): osm_cells(61, delivered.ard)

# -- several extracts

def piece(path, box, at=(), relation=True):
    "Write an extract with nodes in these places, a way and a relation"
    import osmium
    head, new = osmium.io.Header(), osmium.osm.mutable
    head.add_box(osmium.osm.Box(*box))
    with osmium.SimpleWriter(osmium.io.File(str(path)), 2**20, head) as w:
        for i,p in enumerate(at, 1): w.add_node(new.Node(id=i, version=1, location=p))
        w.add_way(new.Way(id=1, version=1, nodes=[1,2]))
        w.add_relation(new.Relation(id=1, version=1, members=[('w',1,'')], tags={'type':'route'}))
    return str(path)

@pytest.fixture
def two_cells(tmp_path):
    "Two cells side by side, an extract with both and one that only has a sliver of the second"
    cells = Cell(33,'031111123030'), Cell(33,'031111123031')
    cells = sorted(cells, key=lambda c: c.lonlat)
    (x0,y),(x1,_) = (c.lonlat for c in cells)
    at = [(x,y+d) for x in (x0,x1) for d in (0,.001)]
    edge = max(p[0] for p in cells[1].geometry_wgs84(8).exterior.coords)
    return cells, folders(tmp_path/'ard', cells), piece(tmp_path/'all.osm.pbf', (x0-1,y-1,x1+1,y+1), at), piece(tmp_path/'east.osm.pbf', (edge-.01,y-1,edge+1,y+1), [(edge+.1,y),(edge+.2,y)])

def test_an_extract_of_next_door_spoils_nothing(two_cells, tmp_path):
    cells, ard, whole, east = two_cells
    fetch_osm(plan_osm(33, ard, source=whole), work_dir=tmp_path/'work')
    before = [cell_state(c, ard) for c in cells]
    run = fetch_osm(plan_osm(33, ard, source=east, refresh=True), work_dir=tmp_path/'work')
    assert (run.skipped,run.failed)==(2,0) and [cell_state(c, ard) for c in cells]==before and before[0].coverage==before[1].coverage==1 and before[0].nodes==2

def test_cells_covered_in_part_are_told(two_cells, tmp_path):
    cells, ard, whole, east = two_cells
    run = fetch_osm(plan_osm(33, ard, source=east), work_dir=tmp_path/'work')
    t = osm_status(33, ard).set_index('cell')
    assert run.extra=={'cells covered in part':1} and 0<t.coverage[cells[1].id]<.5 and t.coverage[cells[0].id]==0 and t.state[cells[0].id]=='failed'
    assert list((tmp_path/'work/extracts').glob('extract-*')) # one cell failed
    run = fetch_osm(plan_osm(33, ard, source=whole), work_dir=tmp_path/'work')
    assert run.exit_code==0 and set(osm_status(33, ard).coverage)=={1} and not run.extra

def test_extract_replaced_before_it_is_read(two_cells, tmp_path, monkeypatch):
    import imagesim.osm
    cells, ard, whole, _ = two_cells
    plain = imagesim.osm.extract_cells
    def late(*a):
        os.utime(whole, (1,1))
        return plain(*a)
    monkeypatch.setattr(imagesim.osm, 'extract_cells', late)
    with pytest.raises(CorruptError, match='changed while it was read'): fetch_osm(plan_osm(33, ard, source=whole), work_dir=tmp_path/'work')
    assert not list(Path(ard).rglob(OSM_FILE))

# -- notes and disks

@pytest.mark.parametrize('note', ['{"attempts":"many"}', '{"attempts":[1],"reason":{},"at":5,"source":[]}', '{"attempts":-1e99,"reason":null}', '[]', '{"attempts":true}'])
def test_notes_of_odd_types(tmp_path, note):
    cell = Cell(33,'031111123030')
    ard = folders(tmp_path, [cell])
    Path(osm_path(ard, cell)).with_name(FAILED_FILE).write_text(note)
    s = cell_state(cell, ard)
    assert (s.state,s.attempts,s.reason,s.source,s.fetched_at)==('failed',1,'not said','','') and type(s.attempts) is int
    assert len(osm_status(33, ard))==len(plan_osm(33, ard).todo)==1

def test_a_failed_refresh_leaves_a_done_cell(delivered, overpass, tmp_path):
    ard = folders(tmp_path/'ard', cells := delivered_cells(delivered)[:1])
    fetch_osm(plan_osm(33, ard, source=str(delivered.pbf)), work_dir=tmp_path/'work')
    good = cell_state(cells[0], ard)
    server = overpass(lambda n: (404, b'gone', 'text/plain'))
    kw = dict(work_dir=tmp_path/'work', sleep=lambda s: None, rounds=1, tries=1)
    for n in (1,2):
        run = fetch_osm(plan_osm(33, ard, endpoint=server.url, refresh=True), **kw)
        now = cell_state(cells[0], ard)
        assert run.failed==1 and now.state=='done' and now.nodes==good.nodes>0 and now.attempts==n and now.reason.startswith('fetching it again failed: ')

def test_a_root_that_takes_no_files_is_found_before_the_work(delivered, overpass, tmp_path):
    server = overpass(json_answer(Path(delivered.overpass).read_bytes()))
    (tmp_path/'file').write_text('')
    for kw in (dict(endpoint=server.url), dict(source=str(delivered.pbf))):
        with pytest.raises(StorageError, match='can not be kept there'): fetch_osm(plan_osm(33, delivered.ard, osm_root=tmp_path/'file/osm', **kw), work_dir=tmp_path/'work')
    assert server.asked==0 and not (tmp_path/'work').exists()

def test_a_disk_that_takes_no_more_stops_the_run(delivered, overpass, tmp_path):
    server = overpass(json_answer(Path(delivered.overpass).read_bytes()))
    cells = [Cell(33,f'03111112303{i}') for i in range(4)]
    ard, root = folders(tmp_path/'ard', cells), tmp_path/'osm'
    (root/'33').mkdir(parents=True)
    (root/'33'/cells[1].quadkey).write_text('') # no folder can be made here, and no note be left
    run = fetch_osm(plan_osm(33, ard, endpoint=server.url, osm_root=root), work_dir=tmp_path/'work')
    assert (run.done,run.failed,run.skipped)==(1,1,2) and OSM_FILE in run.extra['stopped'] and server.asked==2
    assert OSM_FILE in run.failures[0][1] # the first error, not that of the note

def test_any_error_of_a_cell_is_noted(two_cells, tmp_path, monkeypatch):
    import imagesim.osm
    cells, ard, whole, _ = two_cells
    monkeypatch.setattr(imagesim.osm, 'cell_elements', lambda *a: 1/0)
    assert fetch_osm(plan_osm(33, ard, source=whole), work_dir=tmp_path/'work').failed==2
    assert 'ZeroDivisionError' in cell_state(cells[0], ard).reason

@pytest.mark.parametrize('url,public', [('https://overpass-api.de/api/interpreter',True), ('http://OVERPASS-API.de:80/api/interpreter/',True), ('https://lz4.overpass-api.de/api/interpreter',True),
    ('https://u:p@overpass.private.coffee/api',True), ('https://myoverpass-api.de/api',False), ('http://localhost:1/overpass-api.de',False)])
def test_public_servers_by_any_address(url, public):
    cells = [Cell(33,'031111123030')]*11
    plans = [OsmPlan(z, 'overpass', [url], 'x', cells, cells, []) for z in (32,33)]
    assert plans[0].public==public
    check_fair(plans[0])
    check_fair(plans, yes=True)
    if not public: return check_fair(plans)
    with pytest.raises(InputError, match=r'22 cells.*source=.*endpoint=.*yes=True \(--yes\)'): check_fair(plans)

def test_a_delivery_at_the_root():
    from imagesim.osm import _zone_root
    assert [_zone_root(33, p) for p in ('/33','/33/','/','33','a/33','a/b/')]==['/','/','/','.','a','a/b']
