"""Overpass over real HTTP: every real body with its real status, waits on a fake clock, failover, splitting, killed runs, hostile bodies"""
import gzip, json, os, re, signal, subprocess, sys, threading, time, zlib
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np, orjson, overpy, pytest, shapely
from hypothesis import given, settings, strategies as st

from imagesim.ard import APRON_M, Cell, reproject
from imagesim.element import check_osm, osm_path, write_osm
from imagesim.infra import CorruptError, InputError
from imagesim.overpass import (BadAnswer, CutOff, NoServer, OverpassClient, QueryError, ServerBusy, ServerDown, ServerRefused, TooBig, around_query,
    cell_query, check_answer, endpoint_lock, fetch_candidates, overpy_result, parse_body, query_rings, slot_wait)
from imagesim.synth import make_delivery

ROOT = Path(__file__).resolve().parent.parent
CELL = Cell.parse('Z33-031111123030')
HEAD = {'version':0.6, 'generator':'Overpass API 0.7.62', 'osm3s':{'timestamp_osm_base':'2026-03-01T12:00:00Z'}}
STATUS = 'Connected as: 1\nCurrent time: 2026-03-01T12:00:00Z\nRate limit: 2\nSlot available after: 2026-03-01T12:01:35Z, in 95 seconds.\n'

def body_of(elements=(), **more): return orjson.dumps({**HEAD, 'elements':list(elements), **more})
NODE = {'type':'node', 'id':1, 'lat':45.03, 'lon':13.63}
GOOD = dict(body=body_of([NODE]))
DOWN = dict(status=504, body=b'<p><strong>Error</strong>: runtime error: The dispatcher (i.e. the database management system) is turned off. </p>')
BUSY = dict(status=429, body=b'<p><strong>Error</strong>: Dispatcher_Client::request_read_and_idx::rate_limited. </p>')
BIG = dict(body=body_of(remark='runtime error: Query timed out in "query" at line 1 after 181 seconds.'))

class Clock:
    "Nothing here sleeps: time passes when somebody asks it to"
    def __init__(self): self.t, self.slept = 1.8e9, []
    def now(self): return self.t
    def sleep(self, s): self.slept.append(s); self.t += s

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def reply(self, body=b'', status=200, headers=(), send=None, took=0, hang=None, pieces=None):
        "`send`: bytes to send before closing; `hang`: an event to wait for first; `pieces`: seconds of the fake clock after each tenth"
        if hang: hang.wait(20)
        if self.server.clock: self.server.clock.t += took
        try:
            self.send_response(status)
            for k,v in {'Content-Length':str(len(body)), **dict(headers)}.items(): self.send_header(k, v)
            self.end_headers()
            step = max(1, len(body)//10) if pieces else len(body) or 1
            for i in range(0, len(body[:send]), step):
                self.wfile.write(body[:send][i:i+step]); self.wfile.flush()
                if pieces: self.server.clock.t += pieces; time.sleep(.01)
        except (BrokenPipeError, ConnectionResetError): pass
        if send is not None: self.close_connection = True
    def do_GET(self):
        self.server.asked_status += 1
        self.reply(self.server.status_page.encode(), 200 if self.server.status_page else 404)
    def do_POST(self):
        s = self.server
        query = parse_qs(self.rfile.read(int(self.headers['Content-Length'])).decode())['data'][0]
        with s.mutex: s.seen.append((query, dict(self.headers), self.path)); s.running += 1; s.most = max(s.most, s.running)
        try: answer = s.answer(query) if callable(s.answer) else s.answer.pop(0) if len(s.answer)>1 else s.answer[0]
        finally:
            with s.mutex: s.running -= 1 # before the answer leaves: the client that reads its last byte may let the next one ask at once
        self.reply(**answer)

@pytest.fixture
def clock(): return Clock()

@pytest.fixture
def serve(clock):
    "Start servers that answer with a list of replies, the last one staying, or by a function of the query"
    running = []
    def start(*answers, status_page='', fake=True):
        s = ThreadingHTTPServer(('127.0.0.1',0), Handler)
        s.daemon_threads = True
        s.answer = answers[0] if callable(answers[0]) else list(answers)
        s.clock, s.status_page, s.asked_status = clock if fake else None, status_page, 0
        s.seen, s.running, s.most, s.mutex = [], 0, 0, threading.Lock()
        threading.Thread(target=s.serve_forever, kwargs={'poll_interval':.02}, daemon=True).start()
        s.url = f'http://127.0.0.1:{s.server_port}/api/interpreter'
        running.append(s)
        return s
    yield start
    for s in running: s.shutdown(); s.server_close()

@pytest.fixture
def ask(clock):
    "Ask servers with a faked clock; returns what came, and the client"
    made = []
    def run(*servers, query=None, may_split=True, **kw):
        urls = [s if isinstance(s, str) else s.url for s in servers]
        heard = []
        c = OverpassClient(urls, sleep=clock.sleep, now=clock.now, say=heard.append, **kw)
        c.heard = heard
        made.append(c)
        c.result = lambda: c.ask(query or cell_query(CELL), may_split)
        return c
    yield run
    for c in made: c.close()

def read(p): return gzip.decompress(p.read_bytes()) if p.suffix=='.gz' else p.read_bytes()

# real bodies ---------------------------------------------------------------------------------------------------------------------------------------------

GOOD_BODIES = ['empty_sea', 'helsinki_100m_body_recurse', 'munich_1km_union_down', 'vaduz_1km_body_recurse', 'vaduz_1km_geom']

@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('name', GOOD_BODIES)
def test_real_answers(shared, serve, ask, clock, name, packed):
    raw = (shared/f'overpass/{name}.json.gz').read_bytes()
    s = serve(dict(body=raw, headers={'Content-Encoding':'gzip'}) if packed else dict(body=gzip.decompress(raw)))
    found, facts = ask(s).result()
    assert found==parse_body(gzip.decompress(raw))[0] and not clock.slept
    assert facts['data_timestamp']=='2021-04-21T20:21:46Z' and facts['bytes']==(len(raw) if packed else len(gzip.decompress(raw)))
    check_osm({'quadkey':CELL.quadkey, 'meta':{}, **found}, 'here')

@pytest.mark.parametrize('name', GOOD_BODIES)
def test_agrees_with_overpy(shared, name):
    body = read(shared/f'overpass/{name}.json.gz')
    found, theirs = parse_body(body)[0], overpy.Overpass().parse_json(body)
    assert {(n['id'], Decimal(str(n['lon'])), Decimal(str(n['lat'])), *sorted(n.get('tags',{}).items())) for n in found['nodes']} \
        =={(n.id, n.lon.normalize(), n.lat.normalize(), *sorted(n.tags.items())) for n in theirs.nodes}
    assert {w['id']:(w['nodes'], w.get('tags',{})) for w in found['ways']}=={w.id:(w._node_ids, w.tags) for w in theirs.ways}
    kinds = {'RelationNode':'node', 'RelationWay':'way', 'RelationRelation':'relation'}
    assert {r['id']:([(m['type'],m['ref'],m['role']) for m in r['members']], r.get('tags',{})) for r in found['relations']} \
        =={r.id:([(kinds[type(m).__name__],m.ref,m.role) for m in r.members], r.tags) for r in theirs.relations}
    if 'geom' not in name: # there overpy leaves the lines unread
        at = {n.id:[float(n.lon), float(n.lat)] for n in theirs.nodes}
        assert {w['id']:w['geometry'] for w in found['ways']}=={w.id:[at.get(n) for n in w._node_ids] for w in theirs.ways}

def test_lines_in_the_ways_are_the_same(shared):
    geom, recursed = (parse_body(read(shared/f'overpass/vaduz_1km_{k}.json.gz'))[0] for k in ('geom','body_recurse'))
    other = {w['id']:w for w in recursed['ways']}
    assert len(geom['ways'])==208 and all(w==other[w['id']] for w in geom['ways'])

@pytest.mark.parametrize('name,exc', [('dispatcher_off_504.html',ServerDown), ('duplicate_query_200.html',BadAnswer), ('oom_remark_200.json',TooBig), ('syntax_400.html',QueryError),
    ('third_429.txt',ServerBusy), ('timeout_remark_200.json',TooBig), ('too_big_504_504.html',TooBig), ('../partial_with_remark_200.json',TooBig)])
def test_real_refusals(shared, serve, ask, clock, name, exc):
    status, body = int(re.search(r'_(\d{3})\.', name)[1]), (shared/'overpass/errors'/name).read_bytes()
    with pytest.raises(exc): check_answer(status, body)
    s = serve(dict(status=status, body=body), GOOD, status_page=STATUS)
    c = ask(s)
    if exc in (TooBig, QueryError): # another request of the same kind would not help
        with pytest.raises(exc): c.result()
        assert len(s.seen)==1 and not clock.slept
    else:
        assert len(c.result()[0]['nodes'])==1 and len(s.seen)==2 and len(clock.slept)==1 and len(c.heard)>=1
        assert clock.slept[0]>={ServerBusy:96, BadAnswer:30, ServerDown:20}[exc]
    if exc is QueryError:
        with pytest.raises(QueryError, match='an even number of float values'): check_answer(status, body)

# waiting -------------------------------------------------------------------------------------------------------------------------------------------------

def test_busy_waits_thirty_seconds_or_for_the_slot(serve, ask, clock):
    ask(s := serve(BUSY, GOOD)).result()
    assert 30<=clock.slept[0]<45 and s.asked_status==1
    clock.slept.clear()
    ask(serve(BUSY, GOOD, status_page=STATUS)).result()
    assert clock.slept==[96]
    clock.slept.clear()
    ask(serve({**BUSY, 'headers':{'Retry-After':'200'}}, GOOD, status_page=STATUS)).result()
    assert clock.slept==[200]

def test_a_wait_beyond_patience_goes_elsewhere(serve, ask, clock):
    a, b = serve(BUSY, status_page=STATUS.replace('in 95','in 5000')), serve(GOOD)
    found, facts = ask(a, b).result()
    assert facts['endpoint']==b.url and not clock.slept and len(a.seen)==1
    with pytest.raises(NoServer, match='wait 83 min'): ask(a).result()
    assert not clock.slept and len(a.seen)==2

def test_no_password_is_written_down(serve, ask):
    s = serve(GOOD, fake=False)
    c = ask(s.url.replace('//','//me:secret@')+'?key=secret')
    facts = c.result()[1]
    assert facts['endpoint']==s.url and 'secret' not in f'{facts}{c.log}' and 'Authorization' in s.seen[0][1]
    with pytest.raises(NoServer) as e: ask(serve(DOWN).url.replace('//','//me:secret@'), rounds=1).result()
    assert 'secret' not in str(e.value)

def test_a_busy_server_is_not_asked_for_ever(serve, ask, clock):
    a, b = serve(BUSY), serve(GOOD)
    assert ask(a, b).result()[1]['endpoint']==b.url
    assert len(a.seen)==4 and len(clock.slept)==3 and min(clock.slept)>=30

def test_backs_off_longer_and_longer(serve, ask, clock):
    s = serve(DOWN)
    with pytest.raises(NoServer) as e: ask(s, rounds=6).result()
    assert len(s.seen)==6 and all(b>a for a,b in zip(clock.slept, clock.slept[1:])) and clock.slept[0]>=20
    assert all(t in str(e.value) for t in ('turned off', '--source', '127.0.0.1', '6 times'))

def test_a_server_that_names_its_time_is_left_alone_until_then(serve, ask, clock):
    a = serve({**DOWN, 'status':503, 'headers':{'Retry-After':'500'}}, GOOD)
    ask(a).result()
    assert clock.slept==[500]

def test_failover_and_who_answered_comes_first(serve, ask, clock):
    a, b = serve(DOWN), serve(GOOD)
    c = ask(a, b)
    assert c.result()[1]['endpoint']==b.url and c.result()[1]['endpoint']==b.url
    assert (len(a.seen), len(b.seen))==(1,2) and not clock.slept

@pytest.mark.parametrize('status', [403, 406, 404])
def test_who_refuses_is_not_asked_again(serve, ask, clock, status):
    a, b = serve(dict(status=status, body=b'Not Acceptable')), serve(DOWN, DOWN, GOOD)
    c = ask(a, b)
    c.result()
    assert len(a.seen)==1 and len(b.seen)==3
    with pytest.raises(NoServer, match='Not Acceptable'): ask(a).result()
    if status!=404:
        with pytest.raises(NoServer, match='IMAGESIM_CONTACT'): ask(a).result()

def test_nobody_at_home(serve, ask, clock):
    s = serve(GOOD)
    c = ask('http://127.0.0.1:9/api/interpreter', s)
    assert c.result()[1]['endpoint']==s.url and 'no connection' in c.heard[0]
    with pytest.raises(NoServer) as e: ask('http://127.0.0.1:9/api/interpreter', serve(DOWN), 'http://nowhere.invalid/api/interpreter').result()
    assert all(t in str(e.value) for t in ('127.0.0.1:9, 4 times: no connection', 'turned off', 'nowhere.invalid, 4 times'))

def test_silence_is_left(serve, ask):
    release = threading.Event()
    a, b = serve({**GOOD, 'hang':release}), serve(GOOD)
    c = ask(a, b, query='[out:json][timeout:0];out;', grace_s=.3)
    assert c.result()[1]['endpoint']==b.url and 'no answer within' in c.heard[0]
    release.set()

@pytest.mark.parametrize('bad', ['nonsense', 'ftp://x/api', ''])
def test_endpoints_must_be_addresses(bad):
    with pytest.raises(InputError, match='no web address'): OverpassClient(bad)

# bodies that are not what they should be -----------------------------------------------------------------------------------------------------------------

PACKED = gzip.compress(GOOD['body'])

@pytest.mark.parametrize('reply,why', [
    (dict(body=GOOD['body'], send=40), 'ended early'),
    (dict(body=PACKED, send=60, headers={'Content-Encoding':'gzip'}), 'ended early'),
    (dict(body=PACKED[:-12], headers={'Content-Encoding':'gzip'}), 'ends early'),
    (dict(body=PACKED[:30]+b'\0\1\2'+PACKED[33:], headers={'Content-Encoding':'gzip'}), 'damaged'),
    (dict(body=b'\0'*50, headers={'Content-Encoding':'gzip'}), 'damaged'),
    (dict(body=GOOD['body'][:-20]), 'breaks off'),
    (dict(body=GOOD['body'], pieces=500), 'still sending'),
    (dict(body=b'<html><body>Please log in</body></html>'), 'Please log in'),
    (dict(body=b''), 'no reason'),
    (dict(body=b'{"answer":42}'), 'without elements'),
    (dict(body=GOOD['body'], headers={'Content-Encoding':'br'}), 'not asked for'),
    (dict(body=body_of(remark='something odd')), 'something odd'),
])
def test_again_after_a_bad_answer(serve, ask, clock, reply, why):
    s = serve(reply, GOOD)
    c = ask(s)
    assert c.result()[0]['nodes']==[{'id':1,'lon':13.63,'lat':45.03}]
    assert len(s.seen)==2 and len(clock.slept)==1 and clock.slept[0]>=5 and why in c.heard[0]

def test_not_elements_of_osm(serve, ask, clock):
    a, b = serve(dict(body=body_of([{'type':'way','id':1}]))), serve(GOOD)
    assert ask(a, b).result()[1]['endpoint']==b.url
    for odd in ([5], [{'type':'node','id':1,'lat':None,'lon':2}], [{'type':'way','id':1,'nodes':[1],'geometry':[]}], [{'type':'relation','id':1,'members':[{}]}]):
        with pytest.raises(CorruptError): parse_body(body_of(odd))

def test_an_empty_database_is_no_sea(serve, ask):
    a, b = serve(dict(body=orjson.dumps({**HEAD, 'osm3s':{}, 'elements':[]}))), serve(dict(body=body_of()))
    found, facts = ask(a, b).result()
    assert facts['endpoint']==b.url and not any(found.values())

def test_huge_bodies_and_bombs(serve, ask, clock):
    nodes = [{**NODE, 'id':i} for i in range(2000)]
    with pytest.raises(TooBig, match='larger than 10,000 bytes'): ask(serve(dict(body=body_of(nodes))), max_bytes=10_000).result()
    z = zlib.compressobj(9, wbits=31)
    bomb = b''.join([*(z.compress(b' '*2**20) for _ in range(200)), z.flush()])
    a, b = serve(dict(body=bomb, headers={'Content-Encoding':'gzip'})), serve(GOOD)
    c = ask(a, b, tries=1)
    assert c.result()[1]['endpoint']==b.url and 'unpack to more' in c.heard[0]

def test_redirects(serve, ask, clock):
    target = serve(GOOD)
    there = lambda to: dict(status=307, headers={'Location':to})
    home = serve(lambda q: there('/other/interpreter') if len(home.seen)==1 else GOOD)
    assert ask(home).result()[0]['nodes'] and home.seen[1][2]=='/other/interpreter' and home.seen[1][0]==cell_query(CELL)
    away = serve(there(target.url))
    with pytest.raises(NoServer, match='name it as the endpoint'): ask(away).result()
    assert not target.seen
    with pytest.raises(NoServer, match='without end'): ask(serve(there('/again')), rounds=1).result()

def test_introduces_itself(serve, ask, monkeypatch):
    from imagesim import __version__
    from imagesim.overpass import PROJECT_URL
    monkeypatch.setenv('IMAGESIM_CONTACT', 'maps@example.org')
    s = serve(GOOD)
    ask(s).result()
    headers = {k.lower():v for k,v in s.seen[0][1].items()}
    assert headers['user-agent']==f'imagesim/{__version__} ({PROJECT_URL}; maps@example.org)' and headers['accept-encoding']=='gzip'
    assert f'git_url = {PROJECT_URL}' in (ROOT/'settings.ini').read_text()

def test_hostile_tags_come_through(serve, ask, tmp_path):
    tags = {'name':'<script>alert(1)</script>', "'; DROP TABLE x; --":'../../etc/passwd', 'x\0\n\t\u202e':'\U0001f5fa', 'addr:street':'=cmd()', '__class__':'{{7*7}}', 'type':'node'}
    raw = body_of([{**NODE, 'tags':tags}]).replace(b'"addr:street"', rb'"lone \ud800"')
    found = ask(serve(dict(body=raw))).result()[0]
    want = {('lone \ud800' if k=='addr:street' else k):v for k,v in tags.items()}
    assert found['nodes'][0]['tags']==want

@given(st.dictionaries(st.text(), st.text(), max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_tags_come_through(tags):
    try: body = body_of([{**NODE, 'tags':tags}])
    except TypeError: return # orjson writes no lone surrogates
    assert parse_body(body)[0]['nodes'][0].get('tags',{})==tags

def test_of_an_edit_only_version_and_time_are_kept():
    e = {**NODE, 'version':3, 'timestamp':'2016-07-15T19:30:04Z', 'user':'x', 'uid':1, 'changeset':2, 'visible':True}
    assert parse_body(body_of([e]))[0]['nodes']==[{'id':1, 'lon':13.63, 'lat':45.03, 'version':3, 'timestamp':'2016-07-15T19:30:04Z'}]
    assert parse_body(body_of([{**e, 'version':0, 'timestamp':'0000-00-00T00:00:00Z'}]))[0]['nodes']==[{'id':1, 'lon':13.63, 'lat':45.03}]

def test_elements_of_other_kinds_are_counted():
    assert parse_body(body_of([NODE, {'type':'area','id':3600000001}, {'type':'count','id':0}]))[1]['notes']==['2 elements of other kinds left out']

def test_status_pages():
    assert slot_wait(STATUS)==95 and slot_wait('Rate limit: 2\n2 slots available now.\n')==0 and slot_wait('Rate limit: 0\n')==0
    assert slot_wait('<html>404</html>') is None and slot_wait('Slot available after: x, in -3 seconds.')==0

# the query -----------------------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('at', [(13.6,45.03), (-70.6,-33.4), (179.99,-17), (-179.99,65), (0.01,0.001), (15.5,78.2)])
def test_query_covers_the_widened_cell(at):
    cell = Cell.at(*at)
    rings = [shapely.Polygon(r) for r in query_rings(cell)]
    l,b,r,t = cell.buffered(APRON_M)
    edge = np.linspace(0, 1, 50)
    pts = shapely.points(np.concatenate([np.column_stack([l+(r-l)*edge, np.full(50,y)]) for y in (b,t)]+[np.column_stack([np.full(50,x), b+(t-b)*edge]) for x in (l,r)]))
    assert shapely.union_all([p.buffer(1e-9) for p in rings]).covers(reproject(pts, cell.epsg, 4326)).all()
    assert all(np.ptp(r[:,0])<1 and np.abs(r[:,0]).max()<=180 for r in query_rings(cell))
    numbers = [float(v) for p in re.findall(r'poly:"([^"]+)"', cell_query(cell)) for v in p.split()]
    assert max(abs(v-at[1]) for v in numbers[::2])<.2 and all(abs(abs(v)-abs(at[0]))<.5 for v in numbers[1::2]), 'latitude first'

def test_one_out_and_balanced():
    for q in (cell_query(CELL), cell_query(CELL.children()[0], surroundings=False), around_query(CELL)):
        assert q.count('out meta;')==1 and q.rstrip().endswith('out meta;') and q.count('(')==q.count(')')
        made, used = set(re.findall(r'->\.(\w+)', q)), set(re.findall(r'[ (.a-z]\.(\w+)[\[;)]', q.replace('->.','->')))
        assert used<=made, 'no set is read that is not written'
    assert '[timeout:77][maxsize:1000]' in cell_query(CELL, timeout_s=77, maxsize=1000)

# splitting -----------------------------------------------------------------------------------------------------------------------------------------------

class World:
    "Knows a body's elements, and what our queries ask of them"
    def __init__(self, doc, largest_m=1e9):
        self.largest_m, self.by = largest_m, {k:{e['id']:e for e in doc['elements'] if e['type']==k} for k in ('node','way','relation')}
        self.at = {i:(n['lon'],n['lat']) for i,n in self.by['node'].items()}
        self.lines = {i:shapely.LineString([self.at[n] for n in w['nodes']]) for i,w in self.by['way'].items()}
    def areas(self, p):
        ways = [i for i,w in self.by['way'].items() if w['nodes'][0]==w['nodes'][-1] and len(w['nodes'])>3 and shapely.Polygon(self.lines[i]).contains(p)]
        mp = []
        for i,r in self.by['relation'].items():
            outer = shapely.polygonize([self.lines[m['ref']] for m in r['members'] if m['role']=='outer'])
            if r['tags'].get('type')=='multipolygon' and outer.buffer(0).contains(p): mp.append(i)
        return ways, mp
    def __call__(self, q):
        n, w, r = set(), set(), set()
        for p in re.findall(r'  way\(poly:"([^"]+)"', q):
            p = shapely.Polygon(np.array(p.split(), float).reshape(-1,2)[:,::-1])
            if np.ptp(shapely.get_coordinates(p)[:,1])*111_000>self.largest_m: return BIG
            n |= {i for i,o in self.at.items() if p.covers(shapely.Point(o))}
            w |= {i for i,l in self.lines.items() if l.intersects(p)}
        r |= {i for i,o in self.by['relation'].items() if any((m['ref'] in n if m['type']=='node' else m['ref'] in w) for m in o['members'])}
        if m := re.search(r'is_in\(([-\d.]+),([-\d.]+)\)', q):
            p = shapely.Point(float(m[2]), float(m[1]))
            ways, mp = self.areas(p)
            w |= {*ways} | {i for i,o in self.by['way'].items() if o.get('tags',{}).get('natural')=='coastline' and self.lines[i].distance(p)*79_000<20_200}
            r |= {*mp}
        w |= {m['ref'] for i in r for m in self.by['relation'][i]['members'] if m['type']=='way' and self.by['relation'][i]['tags'].get('type')=='multipolygon'}
        n |= {i for o in w for i in self.by['way'][o]['nodes']}
        return dict(body=body_of([*(self.by['node'][i] for i in sorted(n)), *(self.by['way'][i] for i in sorted(w)), *(self.by['relation'][i] for i in sorted(r))]))

@pytest.fixture(scope='module')
def synthetic(tmp_path_factory):
    root = tmp_path_factory.mktemp('synthetic')
    make_delivery(root, size=4, dates=1, cells=1)
    cell = Cell(33, next((root/'ard/33').iterdir()).name)
    return cell, orjson.loads((root/'osm/overpass.json').read_bytes())

@pytest.mark.parametrize('largest_m', [3200, 2000])
def test_quarters_merge_to_the_whole(synthetic, serve, clock, tmp_path, largest_m):
    from imagesim.feature import cell_elements
    cell, doc = synthetic
    kw = dict(sleep=clock.sleep, now=clock.now, say=lambda t: None)
    one, many = serve(World(doc)), serve(World(doc, largest_m))
    whole, f1 = fetch_candidates(cell, one.url, **kw)
    merged, f2 = fetch_candidates(cell, many.url, parts_dir=tmp_path/'parts', **kw)
    assert len(one.seen)==1 and f1['parts']==1 and len(many.seen)==f2['requests']>=6 and f2['parts']>=5
    assert len(whole['ways'])>100 and cell_elements(merged, cell)==cell_elements(whole, cell)
    assert {e['id'] for e in merged['ways']}=={e['id'] for e in whole['ways']} and len(f2['notes'])>=1
    surroundings = [q for q,*_ in many.seen if 'is_in' in q]
    assert len(surroundings)==2, 'the whole, and once more for its quarters'
    if largest_m==3200: assert [*re.findall(r'timeout:(\d+)\]\[maxsize:(\d+)', many.seen[2][0])]==[('90', str(2**28))], 'a quarter announces less'

def test_too_big_at_the_last_level_is_an_error(serve, clock):
    s = serve(lambda q: BIG if 'poly:' in q else dict(body=body_of()))
    with pytest.raises(NoServer, match='timed out'): fetch_candidates(CELL, s.url, sleep=clock.sleep, now=clock.now, say=lambda t: None)
    assert len(s.seen)==8 # levels 12 to 14, what is around, level 15 four times

SCRIPT = '''
import sys
from imagesim.overpass import fetch_candidates
fetch_candidates(sys.argv[1], sys.argv[2], parts_dir=sys.argv[3])
'''

def test_killed_between_quarters(synthetic, serve, tmp_path):
    cell, doc = synthetic
    world, parts = World(doc, 3200), tmp_path/'parts'
    def answer(q):
        if s.child and len(s.seen)==5: s.child.send_signal(signal.SIGKILL) # during the third quarter
        return world(q)
    s = serve(answer, fake=False)
    s.child = subprocess.Popen([sys.executable, '-c', SCRIPT, cell.id, s.url, str(parts)], env={**os.environ, 'PYTHONPATH':str(ROOT)})
    assert s.child.wait(60)==-signal.SIGKILL
    done = sorted(p.name for p in parts.iterdir())
    assert len(done)==4, 'the fact of the split, what is around, two quarters, and nothing half-written'
    s.child = None; s.seen.clear()
    found, facts = fetch_candidates(cell, s.url, parts_dir=parts, say=lambda t: None)
    assert len(s.seen)==2==facts['requests'] and facts['reused']==3
    assert found==fetch_candidates(cell, s.url, say=lambda t: None)[0]

def test_old_or_broken_parts_are_fetched_again(synthetic, serve, clock, tmp_path):
    cell, doc = synthetic
    s, kw = serve(World(doc, 3200)), dict(sleep=clock.sleep, now=clock.now, say=lambda t: None, parts_dir=tmp_path)
    found, _ = fetch_candidates(cell, s.url, **kw)
    s.seen.clear(); fetch_candidates(cell, s.url, **kw)
    assert not s.seen
    next(p for p in sorted(tmp_path.iterdir()) if '_here_' in p.name).write_bytes(b'{"at":')
    assert fetch_candidates(cell, s.url, **kw)[0]==found and len(s.seen)==1
    s.seen.clear(); fetch_candidates(cell, s.url, margin_m=200, **kw)
    assert len(s.seen)==6, 'another margin is another question'
    s.seen.clear(); clock.t += 90_000
    fetch_candidates(cell, s.url, **kw)
    assert len(s.seen)==6

def test_old_data_is_noted(serve, clock):
    kw = dict(sleep=clock.sleep, now=clock.now, say=lambda t: None)
    assert any('days old' in n for n in fetch_candidates(CELL, serve(GOOD).url, **kw)[1]['notes'])
    fresh = serve(dict(body=orjson.dumps({**HEAD, 'osm3s':{'timestamp_osm_base':time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(clock.t-3600))}, 'elements':[NODE]})))
    assert not fetch_candidates(CELL, fresh.url, **kw)[1]['notes']
    undated = serve(dict(body=orjson.dumps({**HEAD, 'osm3s':{}, 'elements':[NODE]})))
    found, facts = fetch_candidates(CELL, undated.url, **kw)
    assert facts['data_timestamp'] is None and any('does not date' in n for n in facts['notes'])

def test_one_request_at_a_time(serve):
    s = serve(lambda q: (time.sleep(.05), GOOD)[1], fake=False)
    many = [threading.Thread(target=fetch_candidates, args=(CELL, s.url), kwargs={'say':lambda t: None}) for _ in range(4)]
    for t in many: t.start()
    for t in many: t.join(60)
    assert (len(s.seen), s.most)==(4, 1)

def test_queues_behind_another_process(serve, tmp_path):
    s = serve(GOOD, fake=False)
    with endpoint_lock(s.url):
        child = subprocess.Popen([sys.executable, '-c', SCRIPT, CELL.id, s.url, str(tmp_path)], env={**os.environ, 'PYTHONPATH':str(ROOT), 'IMAGESIM_PROGRESS':'true'},
                                 stderr=subprocess.PIPE, text=True)
        assert 'queueing' in child.stderr.readline() and not s.seen
    assert child.wait(60)==0 and len(s.seen)==1
    child.stderr.close()

def test_for_readers_who_know_overpy(synthetic, serve, clock, tmp_path):
    cell, doc = synthetic
    found, facts = fetch_candidates(cell, serve(World(doc)).url, sleep=clock.sleep, now=clock.now, say=lambda t: None)
    write_osm(path := osm_path(tmp_path, cell), cell, found, {'source':'overpass', 'endpoint':facts['endpoint']})
    theirs = overpy_result(path)
    assert (len(theirs.ways), len(theirs.relations))==(len(found['ways']), len(found['relations']))
    for w in theirs.ways:
        at = next(o for o in found['ways'] if o['id']==w.id)['geometry'] if w.id%20==0 else None
        if at: assert [[float(n.lon), float(n.lat)] for n in w.nodes]==at

# -- a hostile server

@pytest.mark.parametrize('element', [dict(type='way', id=1, nodes=5), dict(type='way', id=1, nodes=[[1],2]), dict(type='way', id=1, nodes='12'), dict(type='way', id=1, nodes=[1,2], tags='natural'),
    dict(type='relation', id=1, members=[], tags=['a']), dict(type='relation', id=1, members=[dict(type='way', ref=[1], role='')]), dict(type='relation', id=1, members=[dict(type='way', ref=1, role=5)]),
    dict(type='node', id='abc', lon=1, lat=1), dict(type='node', id=1, lon=1e9, lat=1), dict(type='node', id=[1], lon=1, lat=1), 5, None])
def test_an_odd_element_is_a_corrupt_answer(element):
    body = json.dumps(dict(osm3s=dict(timestamp_osm_base='2020-01-01T00:00:00Z'), elements=[dict(type='node', id=7, lon=1, lat=1), element])).encode()
    with pytest.raises(CorruptError, match='not an element of OpenStreetMap'): parse_body(body)

def test_a_deep_answer_is_a_damaged_one():
    with pytest.raises(CutOff): parse_body(b'{"a":"\\ud800","elements":' + b'['*200_000)

@pytest.mark.parametrize('value', ['\u00b2', '9'*400, 'soon', '-5', '', 'Wed, 99 Oct 99999 07:28:00 GMT'])
def test_a_strange_retry_after_is_none(value):
    from imagesim.overpass import _retry_after
    assert _retry_after({'retry-after':value}, 0.)==0

def test_a_strange_status_page_says_nothing():
    from imagesim.overpass import slot_wait
    assert slot_wait('Slot available after: 2020, in '+'9'*5000+' seconds.') is None and slot_wait('\0'*1000) is None

def test_a_status_page_without_end_is_left():
    import http.server, threading
    class Busy(http.server.BaseHTTPRequestHandler):
        sent = 0
        def do_POST(self): self.rfile.read(int(self.headers['Content-Length'])); self.send_response(429); self.send_header('Content-Length', '0'); self.end_headers()
        def do_GET(self):
            self.send_response(200); self.end_headers()
            try:
                while Busy.sent<2**28: self.wfile.write(b'x'*2**16); Busy.sent += 2**16
            except OSError: pass
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with OverpassClient(f'http://127.0.0.1:{server.server_port}/api/interpreter', sleep=lambda s: None, say=lambda s: None, tries=1, rounds=1) as c:
        with pytest.raises(NoServer): c.ask('[out:json][timeout:5];')
    server.shutdown()
    assert Busy.sent<2**26 # what the sockets hold, and no more

def test_the_same_endpoint_twice_is_asked_once():
    from imagesim.overpass import check_endpoints
    assert check_endpoints(['http://a/x', 'http://a/x'])==['http://a/x']
    with pytest.raises(InputError, match='no web address'): check_endpoints('http://[::1')
