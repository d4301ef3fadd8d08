"""The page, in a browser, on a server of its own: what people do there, and that it asks nobody else"""
import contextlib, http.client, http.server, io, json, os, re, shutil, threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np, pytest
from PIL import Image

from conftest import ROOT
from test_serve import PATIENT, Process

CHROMIUM = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)
STATIC, IMAGES = ROOT/'imagesim/static', ROOT/'nbs/images'
SHOTS = os.environ.get('SCREENSHOTS', '') # 1, or a data root such as demo: write the pictures of the docs
LONG = 150_000 # milliseconds that a slow machine may take

if not CHROMIUM: pytest.skip('no Chromium on the PATH (apt-get install chromium)', allow_module_level=True)
if not (STATIC/'index.html').exists(): pytest.skip('the page is not built (make web)', allow_module_level=True)
pytest.importorskip('playwright.sync_api', reason='playwright drives the browser')
from playwright.sync_api import expect, sync_playwright
expect.set_options(timeout=LONG)

ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--enable-unsafe-swiftshader']
QUIET = re.compile('GL Driver Message|swiftshader|WebGL.*fallback', re.I) # how a browser without a graphics card talks of itself

# ---- what the tests stand on

@pytest.fixture(scope='module')
def server(tmp_path_factory, town):
    "The real server, on a small delivery"
    root, there = tmp_path_factory.mktemp('paged')/'root', Path(SHOTS).resolve() if len(SHOTS)>1 else None
    p = Process(root, town, title='A small town', limits=PATIENT) if there is None else Process(root, ard=f'{there}/ard', data_root=str(there), verdicts=f'{root}/verdicts', title='A small town')
    yield p
    assert p.stop()==0 and 'Traceback' not in p.errors(), p.errors()

@pytest.fixture(scope='module')
def chromium():
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield b
        b.close()

@pytest.fixture(scope='module')
def places(server):
    "Chips of the collection, each with its middle; all of them, as a search tells"
    f = server.post('/api/search', json=dict(classes='water', k=1000)).json()['features']
    return {o['properties']['chip']:o['properties'] for o in f}

@pytest.fixture(scope='module')
def middle(places):
    "The chip of the newest date in the middle of what there is"
    new = [p for p in places.values() if p['date']=='2021-08-22']
    at = np.array([[p['lon'],p['lat']] for p in new])
    return new[int(np.abs(at-at.mean(0)).sum(1).argmin())]

def rect(el)->dict: return el.evaluate('e => { const r = e.getBoundingClientRect(); return {x:r.x, y:r.y, width:r.width, height:r.height} }')

class Tab:
    "A page that remembers all that it asked and all that it complained of"
    def __init__(self, chromium, url, size=None, **kw):
        size = size or ((1440,900) if SHOTS else (1180,720))
        self.context = chromium.new_context(viewport=dict(width=size[0], height=size[1]), reduced_motion='reduce', accept_downloads=True, **kw)
        self.context.add_init_script("window.__refused = []; document.addEventListener('securitypolicyviolation', e => window.__refused.push(e.violatedDirective+' '+e.blockedURI))")
        self.page, self.size, self.url, self.asked, self.said = self.context.new_page(), size, url, [], []
        self.page.set_default_timeout(LONG)
        self.page.on('request', lambda r: self.asked.append(r.url))
        self.page.on('console', lambda m: self.said.append(f'{m.type}: {m.text} {m.location.get("url","")}') if m.type in ('error','warning') else None)
        self.page.on('pageerror', lambda e: self.said.append(f'error: {e}'))
    def open(self, hash=''):
        self.page.goto(self.url+hash)
        expect(self.page.locator('body[data-ready]')).to_be_attached()
        return self.settled()
    def settled(self):
        "Wait until the map has drawn all that it knows"
        expect(self.page.locator('.map[data-ready]')).to_be_attached()
        self.page.wait_for_function("() => !document.body.classList.contains('map-busy')")
        return self
    def id(self, name): return self.page.get_by_test_id(name)
    def click(self, name): self.id(name).click()
    def results(self)->list[str]: return self.id('result').evaluate_all('all => all.map(e => e.dataset.chip)')
    def answered(self, act)->dict:
        "Do something that asks the server, and give what it answered"
        with self.page.expect_response(lambda r: '/api/search' in r.url) as r: act()
        out = r.value.json()
        if r.value.ok: expect(self.id('result')).to_have_count(len(out['features']))
        self.page.wait_for_function("() => document.querySelector('[data-testid=results]').getAttribute('aria-busy')==='false'")
        return out
    def centre(self): return self.size[0]/2, self.size[1]/2
    def tiles(self)->list[str]: return [u for u in self.asked if '/tiles/' in u]
    def pixels(self, half=60)->np.ndarray: # (2*half, 2*half, 3)
        "Look at the middle of the map"
        x, y = self.centre()
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot(clip=dict(x=x-half, y=y-half, width=2*half, height=2*half)))).convert('RGB')).astype(int)
    def shot(self, name):
        "Write a picture for the docs"
        if not SHOTS: return
        self.settled()
        self.page.wait_for_function("() => [...document.images].every(i => i.complete || i.loading==='lazy')")
        im = Image.open(io.BytesIO(self.page.screenshot())).convert('RGB')
        for quality in (90, 85, 80, 74, 68): # a picture in the docs stays small
            buf = io.BytesIO()
            im.save(buf, 'JPEG', quality=quality, optimize=True, progressive=True, subsampling=0 if quality>=80 else 2)
            if buf.tell()<295_000: break
        (IMAGES/f'page-{name}.jpg').write_bytes(buf.getvalue())
    def check(self, allowed=()):
        "See that nobody else was asked, nothing was refused, and nothing complained of"
        home = urlsplit(self.url).netloc
        assert not [u for u in self.asked if urlsplit(u).scheme not in ('blob','data') and urlsplit(u).netloc!=home]
        assert all(urlsplit(u).path.startswith(urlsplit(self.url).path) for u in self.asked if urlsplit(u).scheme=='http')
        assert self.page.evaluate('window.__refused')==[]
        loud = [s for s in self.said if not QUIET.search(s) and not any(a in s for a in allowed)]
        assert loud==[], loud
    def close(self): self.context.close()

@pytest.fixture
def tab(chromium, server, request):
    "Open a page; when the test is over, see that it behaved"
    open_tabs, allowed = [], []
    def make(hash='', size=None, url=None, allow=(), start=True, **kw):
        t = Tab(chromium, url or server.url, size, **kw)
        open_tabs.append(t); allowed.append(allow)
        return t.open(hash) if start else t
    yield make
    try:
        if not getattr(request.node, 'failed', False):
            for t,a in zip(open_tabs, allowed): t.check(a)
    finally:
        for t in open_tabs: t.close()

def at(p, zoom=15.6 if SHOTS else 17): return f"#at={p['lon']:.6f},{p['lat']:.6f},{zoom}"

# ---- what people do

def test_it_opens_with_imagery_and_credits(tab, server, middle):
    t = tab(at(middle))
    assert t.page.title().startswith('A small town')
    assert t.tiles() and t.pixels().std()>8 # there is something to see
    expect(t.id('credits')).to_contain_text('Maxar')
    expect(t.id('credits')).to_contain_text('OpenStreetMap')
    expect(t.id('empty')).to_contain_text('Find similar')
    expect(t.id('ask')).to_be_disabled()
    for button in t.page.locator('button:visible').all(): assert (button.get_attribute('aria-label') or button.inner_text()).strip()
    ids = t.page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids)==len(set(ids)) and t.page.evaluate("[...document.images].every(i => i.hasAttribute('alt'))")
    t.page.reload() # also out of the browser's memory
    t.settled()

def test_click_find_similar_like_unlike_and_ask_again(tab, middle, places):
    t = tab(at(middle))
    t.page.mouse.click(*t.centre())
    expect(t.id('place-title')).to_have_text(middle['place'])
    t.page.wait_for_function("() => document.querySelector('[data-testid=chip-image]').naturalWidth===512")
    states = set(t.page.locator('[data-state]').evaluate_all('all => all.map(e => e.dataset.state)'))
    assert states<={'present','absent','unmapped'} and len(states)>1
    words = t.page.locator('[data-state] ~ *, [data-state]').all_inner_texts()
    assert not any('absent' in w for w in words) or any('absent'==w.strip() for w in words)
    assert t.page.locator('tr .prob .number').count()==len(t.page.locator('tr .prob').all())>0
    t.shot('place')
    found = t.answered(lambda: t.click('find-similar'))
    scores = [float(s.replace('−','-')) for s in t.id('score').all_inner_texts()]
    assert scores==sorted(scores, reverse=True) and t.results()==[f['properties']['chip'] for f in found['features']]
    assert all(c in places for c in t.results()) and middle['chip'] not in t.results()
    # a card shows its mark, and a mark its card
    t.id('result').first.hover()
    expect(t.page.locator('.map-tip')).to_contain_text(t.id('score').first.inner_text())
    t.settled().shot('similar')
    shown = next(c for c in t.results() if places[c]['place']!=middle['place'])
    t.page.evaluate('h => { location.hash = h }', re.sub('at=[^&]*', at(places[shown])[1:], t.page.url.partition('#')[2]))
    t.settled()
    t.page.mouse.move(t.centre()[0]+3, t.centre()[1]+3)
    expect(t.page.locator('.card.hover')).to_have_count(1)
    assert places[t.page.locator('.card.hover').get_attribute('data-chip')]['place']==places[shown]['place']
    # likes and dislikes change what is asked, not what is shown, until it is asked again
    before = t.results()
    t.id('card-like').nth(1).click()
    t.id('card-unlike').nth(len(before)-1).click()
    expect(t.id('like').filter(has=t.page.locator('.thumb'))).to_have_count(2)
    expect(t.page.locator('.example.unlike')).to_have_count(1)
    expect(t.id('ask')).to_have_text('Ask again')
    assert t.results()==before
    again = t.answered(lambda: t.click('ask'))
    assert before[1] not in t.results() and before[-1] not in t.results() and again['score']['name']!=found['score']['name']
    t.page.locator('.example.unlike .remove').click()
    expect(t.page.locator('.example.unlike')).to_have_count(0)

def test_class_search_and_what_is_wrong_with_it(tab):
    t = tab(allow=['400 (Bad Request)'])
    expect(t.id('suggestions').locator('button').first).to_be_visible()
    t.shot('start')
    t.id('classes').press_sequentially('fore')
    expect(t.page.locator('#suggestions li')).to_have_text(['forest'])
    t.page.keyboard.press('ArrowDown')
    t.page.keyboard.press('Enter')
    expect(t.id('classes')).to_have_value('forest ')
    t.id('classes').press_sequentially('and water, no houses')
    out = t.answered(lambda: t.page.keyboard.press('Enter'))
    assert out['query']['text']=='forest and water, no houses'
    expect(t.id('results')).to_contain_text('probability')
    t.shot('classes')
    t.id('classes').fill('forrest <img src=x onerror=alert(1)>')
    t.answered(lambda: t.page.keyboard.press('Enter'))
    expect(t.id('problem')).to_contain_text('classes')
    assert t.page.locator('.results img').count()==0
    t.id('classes').fill('forest')
    t.answered(lambda: t.click('retry'))
    expect(t.id('problem')).to_have_count(0)
    t.click('filters-toggle')
    t.id('filter-where').fill('clear>2')
    t.page.keyboard.press('Tab')
    t.answered(lambda: t.click('ask'))
    expect(t.id('problem')).to_be_visible()
    t.id('filter-where').fill('off_nadir<1')
    t.page.keyboard.press('Tab')
    assert t.answered(lambda: t.click('ask'))['features']==[]
    expect(t.id('results')).to_contain_text('Nothing found')
    expect(t.id('funnel')).to_contain_text('off_nadir<1')

def test_a_picture_is_chosen_dropped_and_pasted(tab, server, middle):
    data = server.get(f"/api/chip/{middle['chip']}/image").content
    t = tab(at(middle), allow=['400 (Bad Request)', '413 ('])
    t.answered(lambda: t.id('file').set_input_files(dict(name='<b>mine</b>.jpg', mimeType='image/jpeg', buffer=data)))
    assert t.results()[0]==middle['chip']
    expect(t.page.locator('.example.like img')).to_have_attribute('src', re.compile('^data:image/'))
    assert t.page.locator('.example b').count()==0 and 'picture=1' in t.page.url
    t.shot('picture')
    put = '''([kind, bytes]) => { const d = new DataTransfer(); d.items.add(new File([new Uint8Array(bytes)], 'other.jpg', {type:'image/jpeg'}))
        const e = kind==='paste' ? new ClipboardEvent('paste', {clipboardData:d, bubbles:true, cancelable:true}) : new DragEvent('drop', {dataTransfer:d, bubbles:true, cancelable:true})
        document.body.dispatchEvent(e) }'''
    for n,kind in enumerate(('drop','paste'), 2):
        with t.page.expect_response('**/api/upload') as r: t.page.evaluate(put, [kind, list(data)])
        assert r.value.ok
        expect(t.page.locator('.example.like')).to_have_count(n)
    t.id('file').set_input_files(dict(name='no.jpg', mimeType='image/jpeg', buffer=b'no picture'))
    expect(t.id('toast')).to_be_visible()
    t.id('file').set_input_files(dict(name='notes.txt', mimeType='text/plain', buffer=b'text'))
    expect(t.id('toast')).to_contain_text('notes.txt is not a picture')
    other = tab(t.page.url[t.page.url.index('#'):])
    expect(other.id('lost-picture')).to_be_visible()

def test_the_date_slider_changes_the_tiles(tab, middle):
    t = tab(at(middle))
    best = t.pixels()
    t.id('date-slider').focus()
    t.page.keyboard.press('ArrowLeft')
    expect(t.id('on-top')).to_contain_text('9 May 2019')
    expect(t.page.locator('.map')).to_have_attribute('data-mosaic', 'until=2019-05-09')
    t.settled()
    assert any(parse_qs(urlsplit(u).query).get('until')==['2019-05-09'] for u in t.tiles())
    old = t.pixels()
    t.click('later')
    expect(t.id('on-top')).to_contain_text('22 Aug 2021')
    new = t.settled().pixels()
    assert np.abs(old-new).mean()>1
    t.id('mosaic-on').check(force=True)
    t.page.keyboard.press('[')
    t.settled()
    assert any('on=2019-05-09' in u for u in t.tiles()) and np.abs(t.pixels()-old).mean()<1
    t.id('mosaic-best').check(force=True)
    assert np.abs(t.settled().pixels()-best).mean()<1
    # the place opens on the date that the map shows
    t.id('mosaic-on').check(force=True)
    t.page.keyboard.press('[')
    t.settled().page.mouse.click(*t.centre())
    expect(t.id('dates').locator('[aria-checked=true]')).to_have_text('9 May 2019')
    t.id('dates').locator('[data-date="2021-08-22"]').click()
    expect(t.id('dates').locator('[aria-checked=true]')).to_have_text('22 Aug 2021')

def test_a_link_restores_it_all_in_a_fresh_page(tab, middle):
    t = tab(at(middle, 16.5))
    t.page.mouse.click(*t.centre())
    t.answered(lambda: t.click('find-similar'))
    t.id('card-unlike').last.click()
    t.click('filters-toggle')
    t.id('filter-oneAPlace').check()
    t.id('filter-offNadir').fill('40')
    t.answered(lambda: t.click('ask'))
    heat = t.page.locator('.class-name[aria-pressed]').first
    with t.page.expect_response(lambda r: '/heat' in r.url) as r: heat.click()
    assert r.value.ok
    t.click('earlier')
    t.settled().shot('where')
    t.page.wait_for_function("() => location.hash.includes('until=') && location.hash.includes('heat=')")
    link, results = t.page.url, t.results()
    new = tab(link[link.index('#'):])
    expect(new.id('result')).to_have_count(len(results))
    expect(new.id('place-title')).to_have_text(t.id('place-title').inner_text())
    expect(new.id('heat')).to_be_visible()
    assert new.results()==results and new.id('on-top').inner_text()==t.id('on-top').inner_text()
    assert new.page.locator('.pill').all_inner_texts()==t.page.locator('.pill').all_inner_texts()!=[]
    expect(new.page.locator('.example.unlike')).to_have_count(1)
    new.page.wait_for_function('h => location.hash===h', arg=link[link.index('#'):])
    # and back again
    new.click('clear')
    expect(new.id('result')).to_have_count(0)
    new.page.go_back()
    expect(new.id('result')).to_have_count(len(results))

def test_verdicts_are_saved_listed_exported_and_searched_from(tab, server, middle):
    for v in server.get('/api/verdicts').json()['verdicts']: server.http.delete(f"/api/verdicts/{v['id']}")
    t = tab(at(middle))
    t.id('classes').fill('forest')
    t.answered(lambda: t.page.keyboard.press('Enter'))
    t.page.keyboard.press('Escape')
    for key in 'yyn':
        t.page.keyboard.press('j')
        with t.page.expect_response('**/api/verdicts') as r: t.page.keyboard.press(key)
        assert r.value.ok
    expect(t.page.locator('.card[data-verdict=yes]')).to_have_count(2)
    t.id('result').nth(3).locator('.thumb').click()
    expect(t.id('verdict-unsure')).to_be_visible()
    t.click('verdict-unsure')
    expect(t.id('verdict-unsure')).to_have_attribute('aria-pressed', 'true')
    t.id('subject').select_option(index=1)
    t.click('verdict-no')
    chips = t.results()
    if SHOTS: u = tab(); u.click('tab-verdicts'); expect(u.id('verdict')).to_have_count(5); u.shot('verdicts')
    assert server.post('/api/verdicts', json=dict(chip=chips[0], query='<img src=x onerror=alert(1)>', verdict='yes')).status_code==200
    new = tab()
    new.click('tab-verdicts')
    expect(new.id('verdict')).to_have_count(6)
    expect(new.id('verdict-group')).to_have_count(3)
    expect(new.page.get_by_text('<img src=x onerror=alert(1)>')).to_be_visible()
    with new.page.expect_download() as d: new.click('export-geojson')
    f = json.loads(Path(d.value.path()).read_text())
    assert d.value.suggested_filename.endswith('.geojson') and sorted(o['properties']['verdict'] for o in f['features'])==['no','no','unsure','yes','yes','yes']
    group = new.id('verdict-group').filter(has_text='2 yes · 1 no · 1 unsure')
    out = new.answered(lambda: group.get_by_test_id('search-verdicts').click())
    assert not {*chips[:3]}&{*new.results()} and out['features']
    expect(new.id('from-verdicts')).to_contain_text('forest')
    new.click('tab-verdicts')
    new.id('forget').first.click()
    expect(new.id('verdict')).to_have_count(5)
    assert server.get('/api/verdicts').json()['total']==5
    for v in server.get('/api/verdicts').json()['verdicts']: server.http.delete(f"/api/verdicts/{v['id']}")

def test_a_box_and_an_outline_drawn_on_the_map_filter(tab, middle, places):
    t = tab(at(middle, 16.5))
    t.id('classes').fill('water')
    t.click('filters-toggle')
    t.click('draw-box')
    (x,y), mouse = t.centre(), t.page.mouse
    mouse.move(x-20, y-20); mouse.down(); mouse.move(x+100, y+60, steps=4); mouse.move(x+170, y+150); mouse.up()
    expect(t.id('unfilter-box')).to_be_visible()
    with t.page.expect_request('**/api/search') as r: t.click('ask')
    w,s,e,n = r.value.post_data_json['filters']['box']
    inside = {c for c,p in places.items() if w<=p['lon']<=e and s<=p['lat']<=n}
    expect(t.id('result')).to_have_count(len(inside))
    assert {*t.results()}==inside and 0<len(inside)<len(places)
    t.shot('filters')
    t.id('unfilter-box').click()
    t.click('draw-polygon')
    for dx,dy in ((-130,-130),(130,-130),(0,140)): mouse.click(x+dx, y+dy)
    t.page.keyboard.press('Enter')
    expect(t.id('unfilter-polygon')).to_be_visible()
    with t.page.expect_request('**/api/search') as r: t.click('ask')
    ring = r.value.post_data_json['filters']['polygon']['coordinates'][0]
    assert len(ring)==4 and ring[0]==ring[-1]
    expect(t.id('funnel')).to_contain_text('polygon')
    assert 0<len(t.results())<len(places)
    expect(t.id('place')).to_be_hidden() # drawing opens nothing
    t.click('draw-box')
    t.page.keyboard.press('Escape')
    expect(t.id('draw-box')).to_have_attribute('aria-pressed', 'false')

def test_a_failing_tile_and_a_failing_search_are_told_and_tried_again(tab, middle):
    t = tab(start=False, allow=['500 (', 'net::ERR_'])
    bad = []
    def answer(r): # one tile fails, the others are as they are
        if not bad: bad.append(r.request.url)
        if r.request.url in bad: r.fulfill(status=500, content_type='application/json', body='{"error":{"code":"internal","message":"no"}}')
        else: r.continue_()
    t.page.route('**/tiles/**', answer)
    t.open(at(middle))
    expect(t.id('tile-faults')).to_contain_text('1 map tile missing')
    assert len(bad)==1
    t.page.mouse.click(*t.centre())
    expect(t.id('find-similar')).to_be_visible() # the rest goes on
    t.shot('tile-error')
    t.page.unroute('**/tiles/**')
    t.click('tile-faults')
    expect(t.id('tile-faults')).to_be_hidden()
    assert t.settled().pixels().std()>8
    t.page.route('**/api/search', lambda r: r.abort())
    t.click('find-similar')
    expect(t.id('problem')).to_contain_text('does not answer')
    t.page.unroute('**/api/search')
    t.answered(lambda: t.click('retry'))
    expect(t.id('problem')).to_have_count(0)

def test_one_date_and_nothing_to_search(tab, middle):
    t = tab(start=False)
    def less(r):
        whole = r.fetch()
        config = whole.json()
        config |= dict(schemas=[], dates=config['dates'][-1:], acquisitions=[a for a in config['acquisitions'] if a['date']==config['dates'][-1]])
        r.fulfill(response=whole, json=config)
    t.page.route('**/api/config', less)
    t.open(at(middle))
    expect(t.id('no-schema')).to_be_visible()
    expect(t.id('date-slider')).to_be_hidden()
    expect(t.id('on-top')).to_contain_text('On top 22 Aug 2021')
    t.page.mouse.click(*t.centre())
    expect(t.id('class-table')).to_be_visible() # the labels are there
    expect(t.id('find-similar')).to_have_count(0)
    expect(t.id('classes')).to_be_hidden()

class Prefix(http.server.BaseHTTPRequestHandler):
    "A proxy that shows the server under a path, as Jupyter's does"
    protocol_version, path_is = 'HTTP/1.1', '/user/x/proxy/8080/'
    def log_message(self, *a): pass
    def forward(self):
        n = int(self.headers.get('content-length', 0))
        body = self.rfile.read(n) if n else None
        if not self.path.startswith(self.path_is):
            self.server.strays.append(self.path)
            self.send_response(404); self.send_header('content-length', '0'); self.end_headers()
            return
        c = http.client.HTTPConnection('127.0.0.1', self.server.behind, timeout=60)
        c.request(self.command, self.path[len(self.path_is)-1:], body, {k:v for k,v in self.headers.items() if k.lower() not in ('connection','accept-encoding')})
        r = c.getresponse()
        data = r.read()
        self.send_response(r.status)
        for k,v in r.getheaders():
            if k.lower() not in ('content-length','transfer-encoding','connection'): self.send_header(k, v)
        self.send_header('content-length', str(len(data)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError): self.wfile.write(data)
        c.close()
    do_GET = do_POST = do_DELETE = do_HEAD = forward

def test_it_works_under_a_prefix(tab, server, middle):
    proxy = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Prefix)
    proxy.behind, proxy.strays, proxy.daemon_threads = server.port, [], True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        t = tab(at(middle), url=f'http://127.0.0.1:{proxy.server_port}{Prefix.path_is}')
        assert t.pixels().std()>8
        t.page.mouse.click(*t.centre())
        t.page.wait_for_function("() => document.querySelector('[data-testid=chip-image]')?.naturalWidth===512")
        assert t.answered(lambda: t.click('find-similar'))['features']
        told, said = (lambda r: '/api/verdicts' in r.url and r.request.method in ('POST','DELETE')), set()
        for _ in range(2): # once to say it, once more to take it back; the other way round where an earlier test has said it
            with t.page.expect_response(told) as r: t.click('verdict-yes')
            assert r.value.ok
            said.add(r.value.request.method)
            expect(t.id('verdict-yes')).to_have_attribute('aria-pressed', 'true' if r.value.request.method=='POST' else 'false')
        assert said=={'POST','DELETE'} and proxy.strays==[]
    finally: proxy.shutdown(); proxy.server_close()

def test_a_narrow_screen(tab, middle):
    t = tab(at(middle, 16.5), size=(390,844), has_touch=True, is_mobile=True)
    t.page.touchscreen.tap(195, 300)
    expect(t.id('find-similar')).to_be_visible()
    expect(t.id('credits')).to_be_in_viewport()
    t.shot('narrow')
    t.id('find-similar').tap()
    expect(t.id('result').first).to_be_visible()
    assert t.page.evaluate('document.documentElement.scrollWidth')==390
    for name in ('dock','timeline','credits'):
        r = rect(t.id(name))
        assert r['x']>=0 and r['x']+r['width']<=390, name
    low = rect(t.id('dock'))['height']
    t.id('dock').get_by_test_id('handle').tap()
    expect(t.page.locator('body')).to_have_attribute('data-sheet', 'full')
    t.page.wait_for_function('h => document.querySelector("[data-testid=dock]").getBoundingClientRect().height>h+100', arg=low)
    t.id('result').first.locator('.thumb').tap()
    expect(t.id('place')).to_be_visible()
    small = [b for b in t.page.locator('.place button:visible').all() if min(rect(b)['width'], rect(b)['height'])<24]
    assert not small
    t.id('back').tap()
    expect(t.id('result').first).to_be_visible()

def test_with_the_keyboard_only(tab, middle):
    t = tab(at(middle))
    k = t.page.keyboard
    k.press('Tab')
    assert t.page.evaluate('document.activeElement.className')=='skip'
    for _ in range(60):
        k.press('Tab')
        if t.page.evaluate("document.activeElement.dataset.testid")=='map-canvas': break
        assert t.page.evaluate("document.activeElement.matches(':focus-visible')")
    else: raise AssertionError('Tab never reaches the map')
    expect(t.page.locator('.crosshair')).to_be_visible()
    k.press('Enter')
    expect(t.id('place-title')).to_have_text(middle['place'])
    t.answered(lambda: k.press('s'))
    k.press('j')
    first = t.page.evaluate("document.activeElement.closest('.card').dataset.chip")
    assert first==t.results()[0]
    k.press('ArrowRight')
    k.press('l')
    expect(t.page.locator('.card[data-side=likes]')).to_have_count(1)
    k.press('ArrowRight'); k.press('u')
    expect(t.page.locator('.card[data-side=unlikes]')).to_have_count(1)
    t.answered(lambda: k.press('a'))
    k.press('[')
    expect(t.id('on-top')).to_contain_text('9 May 2019')
    k.press('h')
    expect(t.id('heat')).to_be_attached()
    k.press('?')
    expect(t.id('help')).to_be_visible()
    t.shot('help')
    k.press('Escape')
    expect(t.id('help')).to_be_hidden()
    k.press('/')
    assert t.page.evaluate("document.activeElement.dataset.testid")=='classes'
    k.type('water')
    t.answered(lambda: k.press('Enter'))
    k.press('Escape')
    k.press('v')
    expect(t.id('verdicts')).to_be_visible()
    k.press('Escape')
    expect(t.id('place')).to_be_hidden()
    with t.page.expect_download() as d:
        k.press('v')
        t.id('export').focus()
        k.press('Enter')
    f = json.loads(Path(d.value.path()).read_text())
    assert f['type']=='FeatureCollection' and len(f['features'])==len(t.results()) and any('Maxar' in c for c in f['credits'])

def test_focus_goes_along_where_one_panel_covers_the_other(tab, middle):
    t = tab(at(middle)+'&classes=water&asked=1', size=(1024,700))
    expect(t.id('result').first).to_be_visible()
    t.page.keyboard.press('j')
    t.page.keyboard.press('Enter')
    expect(t.id('find-similar')).to_be_visible()
    expect(t.id('place')).to_be_focused()
    with t.page.expect_response('**/api/labels/*') as r: t.click('features')
    assert r.value.ok
    expect(t.id('features')).to_have_attribute('aria-pressed', 'true')
    t.id('back').focus()
    t.page.keyboard.press('Enter')
    expect(t.id('result').first.locator('.thumb')).to_be_focused()

def test_a_missing_token_is_asked_for(tab):
    data = json.dumps(dict(error=dict(code='unauthorized', message='no token')))
    t = tab(allow=['401 ('])
    t.page.route('**/api/search', lambda r: r.fulfill(status=401, content_type='application/json', body=data))
    t.id('classes').fill('water')
    t.page.keyboard.press('Enter')
    expect(t.id('token-dialog')).to_be_visible()
    t.page.unroute('**/api/search')
    t.id('token').fill('whatever this server does not need')
    t.answered(lambda: t.click('token-send'))
    expect(t.id('token-dialog')).to_be_hidden()
