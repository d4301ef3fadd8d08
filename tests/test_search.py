"""Search: every answer against a slow and plain one, at the edges of zones and of the map, and whatever may be sent as a question"""
import datetime, io, json, math, struct, warnings
from pathlib import Path

import numpy as np, orjson, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, shapely, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from pyproj import Geod

from imagesim.ard import CHIP_LEVEL, Cell
from imagesim.bundle import load_encoder, make_bundle, register_encoder
from imagesim.compress import fit_pca, read_projection
from imagesim.encode import encode
from imagesim.infra import CorruptError, ImagesimError, InputError, MissingError
from imagesim.read import ChipStore
from imagesim.search import (LonLatBox, NothingFound, Origin, RowView, Searcher, chip_outlines, class_scores, count_where, fit_probe, make_where, parse_classes,
    parse_where, read_picture, read_polygon, results_map, search, true_distance, write_results)
from imagesim.similarity import EMBEDDING_COLUMNS, build_schema, open_schema, pull_schema, push_schema, vector_array, verify_schema

CLASSES = ['bright', 'red_roof', 'blue_roof']
IDS = {'10300100AAAA0001':datetime.date(2019,5,9), '10300100AAAA0002':datetime.date(2021,8,22), '10300100AAAA0003':None}

class Tiny(torch.nn.Module):
    "4 x 4 colours about their mean; brightness, red and blue as classes"
    def forward(self, x):
        v = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)-.5
        m = x.mean((2,3))
        return v+1e-3, torch.stack([m.mean(1), m[:,0], m[:,2]], 1)

register_encoder('tiny-search', lambda **o: Tiny())

def picture(seed:int, size=64)->Image.Image:
    "A picture that is like no other"
    a = np.random.default_rng(seed).integers(0, 256, (4,4,3)).astype(np.uint8)
    return Image.fromarray(a).resize((size,size), Image.Resampling.BILINEAR)

def jpg(im, kind='JPEG', **kw)->bytes:
    im.save(out := io.BytesIO(), kind, **({'quality':95} if kind=='JPEG' else {})|kw)
    return out.getvalue()

def write_cell(root, places, catalog_id, vectors, probs, hash, rng):
    "A file of embeddings, as `encode` writes it"
    order = sorted(range(len(places)), key=lambda i: places[i].quadkey)
    places, vectors, probs = [places[i] for i in order], vectors[order], probs[order]
    n, cell, ll = len(places), places[0].parent(12), [p.lonlat for p in places]
    clear = rng.uniform(.3, 1, n)
    cols = [[f'{p.id}_{catalog_id}.jpg' for p in places], [p.id for p in places], [cell.id]*n, [cell.zone]*n, [catalog_id]*n, [IDS[catalog_id]]*n, rng.uniform(.5,1,n),
            [None if c<.5 else c for c in clear], [rng.uniform(5,35)]*n, [o[0] for o in ll], [o[1] for o in ll], [None]*n]
    t = pa.table([pa.array(o).cast(f.type) for o,f in zip(cols, EMBEDDING_COLUMNS)], names=EMBEDDING_COLUMNS.names)
    t = t.append_column('vector', vector_array(vectors)).append_column('probs', vector_array(probs))
    meta = dict(encoder='tiny', encoder_hash=hash, dim=vectors.shape[1], classes=CLASSES, fingerprint=f'{cell.id}{catalog_id}', credits=['made up <b>here</b>'], unreadable=[])
    path = root/'z17'/f'zone={cell.zone:02d}'/f'{cell.quadkey}_{catalog_id}.parquet'
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(t.replace_schema_metadata({'imagesim':orjson.dumps(meta)}), path)

def around(lon, lat, side=5, zone=None)->list[Cell]:
    "A square of places"
    c = Cell.at(lon, lat, CHIP_LEVEL, zone)
    return [Cell.from_xy(c.zone, c.x+i, c.y+j, CHIP_LEVEL) for i in range(side) for j in range(side)]

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A schema over an inner place, a zone's edge in cells of both zones, and the antimeridian; pictures of the inner place"
    root, rng = tmp_path_factory.mktemp('world'), np.random.default_rng(3)
    b = make_bundle(dict(registered='tiny-search', size=32, classes=CLASSES, credits='encoder by nobody'), root/'bundle')
    enc = load_encoder(b)
    grounds = around(13.6, 45.02, 6)+around(17.9995, 45.02, zone=33)+around(17.9985, 45.02, zone=34)+around(179.9985, -16.5, zone=60)+around(-179.9995, -16.5, zone=1)
    units = {}
    for k,p in enumerate(dict.fromkeys(grounds)):
        for j,cid in enumerate(IDS):
            if cid=='10300100AAAA0003' and k%3: continue
            units.setdefault((p.parent(12), cid), []).append((p, picture(1000*(k%40)+j*(k%2))))
    for (cell,cid),members in units.items():
        v, probs = enc.encode(np.stack([np.asarray(im.resize((32,32), Image.Resampling.BILINEAR)).transpose(2,0,1) for _,im in members]))
        write_cell(root/'embeddings', [p for p,_ in members], cid, v, probs, b.hash, rng)
        for p,im in members:
            f = root/'chips'/f'{p.zone:02d}'/f'{p.id}_{cid}.jpg'
            f.parent.mkdir(parents=True, exist_ok=True)
            if p.zone==33: f.write_bytes(jpg(im))
    build_schema('land', b, root/'embeddings', root=root/'schemas')
    return root

@pytest.fixture(scope='module')
def s(world): return Searcher(world/'schemas/land', chips=world/'chips')

def table(s)->pd.DataFrame:
    "All rows, the slow way"
    t = s.collection.rows.drop_columns(['geometry','probs']).to_pandas()
    t['date'] = pd.to_datetime(t.date)
    return t

def by_sorting(s, vector, keep, k, without=(), one=False)->list[str]:
    "The answer that nobody can argue with; places by id only"
    t = table(s).assign(score=np.round(s.collection.vectors(np.arange(len(s.view)))@vector, 6))
    t = t[keep & ~t.chip.isin(without)].sort_values(['score','chip'], ascending=[False,True], kind='stable')
    return (t.drop_duplicates('place') if one else t).chip.head(k).tolist()

# --- answers

@pytest.mark.parametrize('k', [1, 7, 40, 10_000])
@pytest.mark.parametrize('line, keep', [
    ('', lambda t: t.chip!=''), ('off_nadir<20', lambda t: t.off_nadir<20), ('clear>=0.9', lambda t: t.clear>=.9), ('not clear>=0.9', lambda t: t.clear<.9),
    ('zone=34 or zone=1', lambda t: t.zone.isin([34,1])), ('date>=2020', lambda t: t.date>='2020'), ('valid>0.8, lat<0', lambda t: (t.valid>.8)&(t.lat<0)),
    ('catalog_id=10300100AAAA0003', lambda t: t.catalog_id=='10300100AAAA0003'), ('0.6<=valid<0.7', lambda t: (t.valid>=.6)&(t.valid<.7))])
def test_a_filter_yields_what_sorting_yields(s, line, keep, k):
    t = table(s)
    chip = t.chip[11]
    r = s.search(chip, k=k, where=line or None)
    want = by_sorting(s, s.collection.vectors([11])[0], keep(t), k, [chip])
    assert r.chip.tolist()==want
    assert len(want)==min(k, (keep(t)&(t.chip!=chip)).sum()) # never fewer while there are any
    assert r.attrs['funnel'][-1][1]==(keep(t)&(t.chip!=chip)).sum()

@pytest.mark.parametrize('k', [1, 10, 35, 10_000])
def test_one_a_place_yields_all_there_are(s, k):
    t = table(s)
    inner = (t.zone==33)&(t.lon<14)
    r = s.search(t.chip[0], k=k, where='lon<14 and zone=33', one_a_place=True)
    assert r.chip.tolist()==by_sorting(s, s.collection.vectors([0])[0], inner, k, [t.chip[0]], one=True)
    assert len(r)==min(k, 36) and r.place.is_unique

def test_equal_scores_are_ordered_by_name_and_cut_the_same_way(s):
    t = table(s)
    r = s.search(vector=s.collection.vectors([11])[0], k=len(t))
    same = r[r.score==r.score[0]]
    assert len(same)>=3 and same.chip.tolist()==sorted(same.chip) # places repeat their pictures: true ties
    for k in range(1, len(same)+1): assert s.search(vector=s.collection.vectors([11])[0], k=k).chip.tolist()==same.chip.tolist()[:k]

def test_scores_are_cosines(s):
    r = s.search(vector=-s.collection.vectors([11])[0], k=10_000)
    assert r.score.between(-1, 1).all() and r.score.min()<-.99 and (r.score<0).any() and r.attrs['score'].startswith('cosine')

def test_a_filter_on_probabilities(s):
    p = s.view.probs('red_roof')
    r = s.search(table(s).chip[0], k=10_000, probs=dict(red_roof=.55), where='bright<0.6')
    want = (p>=np.float32(.55))&(s.view.probs('bright')<.6)
    assert set(r.chip)==set(table(s).chip[want])-{table(s).chip[0]} and len(r)

# --- where

_num = st.tuples(st.sampled_from(['valid','clear','off_nadir']), st.sampled_from(['<','<=','>','>=','=','!=']), st.integers(0,10).map(lambda i: i/10))
_day = st.tuples(st.just('date'), st.sampled_from(['<','<=','>','>=','=','!=']), st.sampled_from(['2019-05-09','2020-01-01','2021-08-22']))
def _line(depth):
    leaf = st.one_of(_num, _day).map(lambda t: (f'{t[0]}{t[1]}{t[2]}', t))
    return st.recursive(leaf, lambda c: st.one_of(st.tuples(st.sampled_from(['and','or']), c, c).map(lambda t: (f'({t[1][0]} {t[0]} {t[2][0]})', t)), c.map(lambda x: (f'not {x[0]}', ('not', x)))), max_leaves=depth)

def _truth(tree, row)->object: # True, False or None, as a person would say
    t = tree[1]
    if t[0]=='not': return None if (v := _truth(t[1], row)) is None else not v
    if t[0] in ('and','or'):
        a, b = _truth(t[1], row), _truth(t[2], row)
        if t[0]=='and': return False if a is False or b is False else None if a is None or b is None else True
        return True if a is True or b is True else None if a is None or b is None else False
    v = row[t[0]]
    if v is None: return None
    w = datetime.date.fromisoformat(t[2]) if t[0]=='date' else t[2]
    return {'<':v<w, '<=':v<=w, '>':v>w, '>=':v>=w, '=':v==w, '!=':v!=w}[t[1]]

ROWS = [dict(valid=v/10, clear=c, off_nadir=float(o), date=d) for v in (0,5,10) for c in (None,.3,.9) for o in (0,1) for d in (None, *filter(None, IDS.values()))]
VIEW = RowView(pa.table(dict(valid=pa.array([r['valid'] for r in ROWS], pa.float64()), clear=pa.array([r['clear'] for r in ROWS], pa.float64()), off_nadir=pa.array([r['off_nadir'] for r in ROWS], pa.float64()),
    date=pa.array([r['date'] for r in ROWS], pa.date32()), lon=np.zeros(len(ROWS)), lat=np.zeros(len(ROWS)))))

@settings(max_examples=150, deadline=None)
@given(_line(8))
def test_a_line_means_what_it_says(tree):
    keep = count_where(parse_where(tree[0]), VIEW)[0]
    assert keep.tolist()==[_truth(tree, r) is True for r in ROWS], tree[0]

@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(['valid','clear','bright','and','or','not','(',')',',','<','>=','=','0.5','2020','in','box','polygon','distance','"x"','one_a_place','other_place','chip']), max_size=12).map(' '.join)))
def test_any_line_is_read_or_refused_in_our_words(text):
    for read in (lambda: count_where(parse_where(text, CLASSES), VIEW, Origin(np.zeros((1,2)))), lambda: parse_classes(text, CLASSES)):
        try: read()
        except (InputError, MissingError) as e: assert str(e)
        except KeyError as e: assert e.args[0].split('"')[1] in ('chip','place','catalog_id','zone','probs') # VIEW has few columns

@pytest.mark.parametrize('line, says', [
    ('clouds<0.1', "there is no 'clouds'"), ('offnadir<3', "did you mean 'off_nadir'"), ('clear>=90', 'write 0.9 or 90%'), ('date>2021-13-01', 'not a day'), ('valid', 'compare it'), ('valid>', 'it ends where'),
    ('(valid>0.5', 'not closed'), ('valid>0.5 clear>0.5', 'connect with'), ('zone=0', 'between 1 and 60'), ('zone=x', 'is a number'), ('chip<3', 'only ='), ('box(1,2,3)', 'is no box'), ('box(0,9,1,8)', 'south first'),
    ('distance=5', 'never exactly'), ('place=Z33-9', 'digits'), ('catalog_id in 5', 'bracket'), ('polygon(nowhere.geojson)', 'nothing there'), ("polygon('POINT(1 2)')", 'no area'), ('red_roof>2', 'between 0 and 1'), ('"', 'quotation'),
    ('('*60+'valid>0'+')'*60, '50 brackets'), ('valid>nan', 'between'), ('one_a_place or valid>0.5', 'stands alone')])
def test_a_wrong_line_is_told_why(s, line, says):
    with pytest.raises(ImagesimError, match=says.replace('(', r'\(')): s.search(table(s).chip[0], where=line)

# --- ground

def test_distance_is_true_across_zones(s):
    t, g = table(s), Geod(ellps='WGS84')
    at = int(np.flatnonzero((t.zone==34)&(t.lon>17.99)&(t.lon<18.01))[0])
    d = g.inv(np.full(len(t), t.lon[at]), np.full(len(t), t.lat[at]), t.lon, t.lat)[2]
    for m in (100, 250, 1000, 4.8e5):
        assert set(s.search(t.chip[at], k=10_000, apart_m=m).chip)==set(t.chip[d>=m])
        assert set(s.search(t.chip[at], k=10_000, where=f'distance<{m}').chip)==set(t.chip[d<m])-{t.chip[at]}
    r = s.search(t.chip[at], k=10)
    assert np.allclose(r.distance_m, [d[t.chip==c][0] for c in r.chip], atol=.06)

def test_the_same_ground_in_two_zones_is_one_place(s):
    t = table(s)
    edge = t[(t.lon>17.9)&(t.lon<18.1)].drop_duplicates('place')
    overlap = [(a.chip, b.chip, true_distance([[a.lon,a.lat]], [[b.lon,b.lat]])[0]) for a in edge[edge.zone==33].itertuples() for b in edge[edge.zone==34].itertuples()]
    assert min(o[2] for o in overlap)<60
    r = s.search(edge.chip.iloc[0], k=10_000, one_a_place=True, box=(17.9,45,18.1,45.1))
    pairs = [Geod(ellps='WGS84').inv(r.lon[i], r.lat[i], r.lon[j], r.lat[j])[2] for i in range(len(r)) for j in range(i+1,len(r))]
    assert min(pairs)>105 and set(r.zone)=={33,34}
    a = min(overlap, key=lambda o: o[2])
    assert a[1] in set(s.search(a[0], k=10_000).chip) and a[1] not in set(s.search(a[0], k=10_000, other_place=True).chip)

def test_a_position_asks_both_zones_and_the_owner_answers(s):
    t = table(s)
    lon, lat = 18.0004, 45.0203
    both = [Cell.at(lon, lat, CHIP_LEVEL, z).id for z in (33,34)]
    assert set(both)<=set(t.place)
    assert s.search(lonlat=(lon,lat), date='2019-06', k=1).attrs['query']['like'][0]['name']==f'{both[1]}_10300100AAAA0001.jpg'
    assert s.search(lonlat=(17.9996,lat), date='2022', k=1).attrs['query']['like'][0]['name'].startswith('Z33-')
    assert s.view.texts('chip', [s.at(lon, lat)])[0].endswith('0002.jpg') # the latest; the undated one is never that

def test_the_antimeridian(s):
    t = table(s)
    b = LonLatBox(179.99, -17, -179.99, -16)
    there = t[t.lat<0]
    assert len(there) and there.lon.min()<0<there.lon.max()
    r = s.search(there.chip.iloc[0], k=10_000, box=b)
    assert set(r.chip)==set(there.chip)-{there.chip.iloc[0]} and r.distance_m.max()<5000
    assert (r.geometry.geom_type=='MultiPolygon').any() and r.total_bounds[0]>=-180 and r.total_bounds[2]<=180
    assert set(s.search(there.chip.iloc[0], k=10_000, polygon=shapely.box(179.99,-17,180.01,-16)).chip)==set(r.chip)
    s.visualize_results(r)
    assert math.isclose(sum(g.area for g in chip_outlines([there.place.iloc[0]])), Cell.parse(there.place.iloc[0]).geometry_wgs84().area, rel_tol=1e-9)

def test_polygons(s, tmp_path):
    t, p = table(s), shapely.Polygon([(13.6,45.02),(13.61,45.02),(13.605,45.03)])
    want = set(t.chip[shapely.contains_xy(p, t.lon, t.lat)])
    assert 3<len(want)<len(t)
    forms = [p, p.wkt, p.__geo_interface__, dict(type='FeatureCollection', features=[dict(type='Feature', properties={}, geometry=p.__geo_interface__)])]
    (tmp_path/'a b.geojson').write_text(json.dumps(forms[3]))
    for f in [*forms, tmp_path/'a b.geojson', str(tmp_path/'a b.geojson')]: assert set(s.search(vector=np.ones(48), k=10_000, polygon=f).chip)==want
    assert set(s.search(vector=np.ones(48), k=10_000, where=f'polygon("{tmp_path}/a b.geojson")').chip)==want
    with pytest.raises(InputError, match='not in degrees'): read_polygon(shapely.box(4e5,5e6,4.1e5,5.1e6))
    with pytest.raises(InputError, match='no area'): read_polygon(dict(type='FeatureCollection', features=[]))

# --- pictures

@pytest.mark.parametrize('kind, mode', [('JPEG','RGB'), ('JPEG','L'), ('JPEG','CMYK'), ('PNG','RGB'), ('PNG','RGBA'), ('PNG','P'), ('PNG','LA'), ('PNG','1'), ('WEBP','RGB'), ('TIFF','RGB'), ('GIF','P'), ('BMP','RGB'), ('PNG','I;16')])
def test_pictures_of_every_kind(kind, mode):
    im = picture(5, 96)
    im = Image.fromarray((np.asarray(im.convert('L')).astype(np.uint16)*200)) if mode=='I;16' else im.convert(mode)
    out = read_picture(jpg(im, kind), 32)
    assert (out.mode, out.size)==('RGB', (32,32)) and np.asarray(out).std()>10

@pytest.mark.parametrize('o', range(1,9))
def test_pictures_are_turned_as_the_camera_says(o):
    from PIL import ImageOps
    im, e = picture(6, 80), Image.Exif()
    e[0x0112] = o
    data = jpg(im, exif=e)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB')
    assert np.abs(np.asarray(read_picture(data)).astype(int)-np.asarray(want).astype(int)).max()==0

def test_pictures_that_are_refused(tmp_path):
    good = jpg(picture(5, 200))
    for n in (0, 1, 20, 300, len(good)//2, len(good)-10):
        with pytest.raises(CorruptError): read_picture(good[:n])
    with pytest.raises(InputError, match='may have'): read_picture(jpg(Image.new('RGB', (900,900))), max_pixels=1000)
    with pytest.raises(InputError, match='bytes'): read_picture(good, max_bytes=100)
    (tmp_path/'big.jpg').write_bytes(good)
    with pytest.raises(InputError, match='bytes'): read_picture(tmp_path/'big.jpg', max_bytes=100)
    with pytest.raises(MissingError): read_picture(tmp_path/'none.jpg')
    with pytest.raises(InputError, match='nothing to see'): read_picture(jpg(picture(1, 4), 'PNG'))
    with pytest.raises(InputError): read_picture(jpg(Image.new('1', (30_000,30_000)), 'PNG'))
    with pytest.raises(CorruptError, match='no picture'): read_picture(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')

def test_a_chip_as_a_picture_finds_itself(s, world, bucket):
    chip = next(c for c in table(s).chip if c.startswith('Z33'))
    path = world/'chips/33'/chip
    for image in (path, str(path), path.read_bytes(), Image.open(path)):
        r = s.search(image=image, k=3)
        assert r.score[0]>.995 and r.score[0]==pytest.approx(s.search(chip, k=1).score[0], abs=.02) or r.chip[0]==chip
    from imagesim.infra import write_bytes
    write_bytes(f'{bucket}/q.jpg', path.read_bytes())
    assert s.search(image=f'{bucket}/q.jpg', k=3).chip.tolist()==s.search(image=path, k=3).chip.tolist()
    assert r.attrs['query']['like'][0]['picture'] and r.distance_m.isna().all()

@pytest.fixture(scope='module')
def own(tmp_path_factory):
    "Chips as files, encoded by `encode`: a larger side than the network's, so that jpgs are decoded at a fraction of it"
    root, places = tmp_path_factory.mktemp('own'), around(13.6, 45.02, 4)
    (root/'chips/33').mkdir(parents=True)
    for i,p in enumerate(places): (root/'chips/33'/f'{p.id}_10300100AAAA0001.jpg').write_bytes(jpg(picture(i, 150 if i%2 else 90)))
    b = make_bundle(dict(registered='tiny-search', size=32, classes=CLASSES), root/'bundle')
    assert encode(b, root/'chips', root/'e', workers=0).failed==0
    assert build_schema('own', b, root/'e', root=root/'schemas').failed==0
    return Searcher(root/'schemas/own', chips=root/'chips')

def test_a_chips_own_file_is_asked_as_the_chip(own):
    for chip in own.collection.rows['chip'].to_pylist():
        path = Path(own.store.chips)/'33'/chip
        want = own.search(chip, k=15)
        for image in (path, path.read_bytes()):
            r = own.search(image=image, k=16)
            assert r.chip[0]==chip and r.score[0]>.9999 and r.chip[1:].tolist()==want.chip.tolist() and np.allclose(r.score[1:], want.score, atol=2e-4) # kept as halves

def test_text_opens_nothing_unless_told(own, tmp_path, bucket):
    from imagesim.infra import write_bytes
    chip = own.collection.rows['chip'][0].as_py()
    (tmp_path/'q.jpg').write_bytes((Path(own.store.chips)/'33'/chip).read_bytes())
    write_bytes(f'{bucket}/q.jpg', (tmp_path/'q.jpg').read_bytes())
    for text in (str(tmp_path/'q.jpg'), f'{bucket}/q.jpg', str(tmp_path/'nothing'), '/etc/hostname', '13.6,45.0'):
        for q in (dict(chip=text), dict(like=text), dict(like=[chip, text]), dict(chip=chip, unlike=[text]), dict(lonlat=text)):
            with pytest.raises(InputError, match='chip name|no position'): own.search(**q)
    for q in (dict(like=tmp_path/'q.jpg'), dict(like=str(tmp_path/'q.jpg'), files=True), dict(like=[f'{bucket}/q.jpg'], files=True)):
        assert own.search(k=1, **q).chip[0]==chip
    with pytest.raises(InputError, match='chip name'): own.search(chip=str(tmp_path/'q.jpg'), files=True)

def test_no_message_quotes_from_a_file(own, tmp_path):
    def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+b'\0\0\0\0'
    contents = [b'SECRET=hush', b'\xff\xd8SECRET=hush', b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', b'\0\0\0\x20\0\0\0\x20\x08\x02\0\0\0')+chunk(b'hush', b'hush'*9), b'GIF89ahush', b'BMhush', b'{"hush": ["hush"]}', b'"hush"', b'["hush"]',
                b'{"type":"FeatureCollection","features":["hush"]}', b'{"type":"FeatureCollection","features":"hush"}', b'{"type":"Polygon","coordinates":"hush"}']
    for i,data in enumerate(contents):
        (tmp_path/f'{i}.json').write_bytes(data)
        for q in (dict(image=tmp_path/f'{i}.json'), dict(image=data), dict(like=str(tmp_path/f'{i}.json'), files=True), dict(vector=np.ones(48), polygon=tmp_path/f'{i}.json'), dict(vector=np.ones(48), where=f'polygon("{tmp_path}/{i}.json")')):
            with pytest.raises(ImagesimError) as e: own.search(**q)
            assert 'hush' not in str(e.value) and 'SECRET' not in str(e.value)

# --- examples and classes

def test_a_probe_is_the_same_every_time_and_moves_as_told(s, world):
    t = table(s)
    likes, unlike = t.chip[[3,40]].tolist(), t.chip[60]
    a, b = s.search(like=likes, k=50), Searcher(world/'schemas/land').search(like=likes[::-1], k=50)
    assert a.chip.tolist()==b.chip.tolist() and np.allclose(a.score, b.score, atol=1e-3) and a.score.between(0,1).all() and a.attrs['score']=='probe, 0 to 1'
    assert not set(likes) & set(a.chip)
    wrong = a.chip[0] # what came first is not wanted after all
    after = s.search(like=likes, unlike=[wrong], k=10_000)
    assert wrong not in set(after.chip) and len(after)==len(t)-3
    v = s.collection.vectors(np.arange(len(t)))
    i = s.rows_of([wrong])[0]
    like_wrong = t.chip[np.argsort(-(v@v[i]), kind='stable')[:12]]
    score = lambda r: r.score[r.chip.isin(like_wrong)].mean()
    assert score(after)<score(s.search(like=likes, k=10_000))-.01

def test_a_plane_separates_what_is_separable():
    rng = np.random.default_rng(0)
    d = 64
    a, b = rng.normal(size=d), rng.normal(size=d)
    unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
    group = lambda n: unit(a*.5+rng.normal(size=(n,d))*.7)
    likes, rest = group(8), unit(rng.normal(size=(800,d)))
    p = fit_probe(likes, rest[:0], rest)
    hits, miss = p.margin(group(300)), p.margin(unit(rng.normal(size=(300,d))))
    assert (hits[:,None]>miss).mean()>.97
    p = fit_probe(likes[:1], likes[:1], likes[:1]) # contradicts itself
    assert np.isfinite(p.weights).all() and np.linalg.norm(p.weights)>0

@settings(max_examples=60, deadline=None)
@given(st.recursive(st.sampled_from(CLASSES), lambda c: st.one_of(st.tuples(st.sampled_from([' and ',' or ']), c, c).map(lambda t: f'({t[1]}{t[0]}{t[2]})'), c.map(lambda x: f'not {x}')), max_leaves=6))
def test_classes_are_probabilities(line):
    p = np.array([[.2,.5,1],[0,.3,.7]])
    v = RowView(pa.table(dict(probs=pa.FixedSizeListArray.from_arrays(pa.array(p.astype('f2').ravel()), 3))), CLASSES)
    def value(row): return eval(line.replace('not ','~').replace(' and ','&').replace(' or ','|'), {c:P(x) for c,x in zip(CLASSES,row)}).x
    assert np.allclose(class_scores(parse_classes(line, CLASSES), v), [value(r) for r in p.astype('f2')], atol=2e-3)

class P:
    "A probability that knows and, or and not"
    def __init__(self, x): self.x = float(x)
    def __and__(self, o): return P(self.x*o.x)
    def __or__(self, o): return P(1-(1-self.x)*(1-o.x))
    def __invert__(self): return P(1-self.x)

@pytest.mark.parametrize('line, same', [('bright, red_roof', 'bright and red_roof'), ('bright and red roof', 'bright and red_roof'), ('Bright, no RED', 'bright and not red_roof'), ('bright without blue', 'bright and not blue_roof'),
    ('bright or red, no blue', '(bright or red) and not blue'), ('bright but no "red roof"', 'bright and not red_roof'), ('not not bright', 'bright')])
def test_ways_to_say_it(s, line, same):
    assert np.allclose(class_scores(parse_classes(line, CLASSES), s.view), class_scores(parse_classes(same, CLASSES), s.view), atol=1e-6)

def test_classes_rank_by_probability(s):
    p = s.view.probs('red_roof')*(1-s.view.probs('blue_roof'))
    r = s.search(classes='red and not blue', k=15)
    assert np.allclose(r.score, np.sort(p)[::-1][:15], atol=1e-5)
    assert s.search(classes='bright', unlike=table(s).chip[2], k=3).attrs['score'].startswith('probe x classes')
    with pytest.raises(InputError, match='it could be red_roof or blue_roof'): s.search(classes='roof')
    with pytest.raises(InputError, match='did you mean'): s.search(classes='brigt')
    with pytest.raises(InputError, match='no classes'): parse_classes('forest', [])

# --- what can go wrong

@pytest.mark.parametrize('question, says', [
    (dict(), 'nothing to look for'), (dict(chip='x'), 'chip name|no query|nothing there'), (dict(chip='Z33-03111112303000000_NOBODY'), 'not in collection'), (dict(chip='Z31-03111112303000000_NOBODY'), 'nor is its place'),
    (dict(lonlat=(0,0)), 'shows nothing'), (dict(lonlat=(0,95)), 'outside'), (dict(lonlat=('a','b')), 'position|chip|nothing|picture|number'), (dict(vector=np.zeros(48)), 'zeros'), (dict(vector=np.full(48,np.nan)), 'NaN'),
    (dict(vector=np.ones(5)), 'another encoder'), (dict(k=0), 'k must be'), (dict(k=2.5), 'k must be'), (dict(k=True), 'k must be'), (dict(since='soon'), 'not a day'), (dict(colour=3), 'search has no'), (dict(empty='perhaps'), "'raise' or 'return'"),
    (dict(date='2020'), 'comes with lonlat'), (dict(like=[7]), 'no query'), (dict(probs=dict(sea=.5)), "no 'sea'"), (dict(clear=90), 'write 0.9'), (dict(zone=99), 'between 1 and 60'),
    (dict(apart_m='far'), 'apart_m is a number'), (dict(apart_m=math.nan), 'apart_m lies'), (dict(clear='most'), 'clear is a number'), (dict(where='date=9999-12'), 'no chip passes'), (dict(until='9999-13'), 'not a day'), (dict(classes=5), 'classes is 5'),
    (dict(classes=['bright',None]), 'list of names'), (dict(probs={'clear':.5}), "no 'clear' among the classes"), (dict(probs=5), 'give a dict'), (dict(probs={'bright':'x'}), 'is a number'), (dict(like=5), 'no query'), (dict(image=5), 'no picture'),
    (dict(image=np.zeros((0,0,3),'u1')), 'as an array'), (dict(lonlat=(1,)), 'no position'), (dict(lonlat=7), 'no position'), (dict(lonlat='15,50'), 'no position'), (dict(polygon=dict(type='FeatureCollection', features=5)), 'no geometry')])
def test_bad_questions_are_told_why(s, question, says):
    import re
    q = question if set(question)&{'chip','lonlat','vector','like'} or not question else dict(chip=table(s).chip[0])|question
    with pytest.raises(ImagesimError) as e: s.search(**q)
    assert re.search(says, str(e.value)), str(e.value)

def test_numbers_may_be_text_and_positions_lists(s):
    t = table(s)
    assert s.search(t.chip[0], k=9, zone='33', clear='50%').chip.tolist()==s.search(t.chip[0], k=9, zone=33, clear=.5).chip.tolist()
    at = [float(t.lon[0]), float(t.lat[0])]
    names = {s.search(k=1, **q).attrs['query']['like'][0]['name'] for q in (dict(lonlat=at), dict(lonlat=tuple(at)), dict(lonlat=np.array(at)), dict(like=at), dict(like=[at]))}
    assert len(names)==1 and len(s.search(lonlat=[at, (t.lon.iloc[-1], t.lat.iloc[-1])], k=1).attrs['query']['like'])==2
    assert count_where(make_where(until='9999-12', on=None), s.view)[0].sum()==t.date.notna().sum()

def test_a_class_may_be_called_like_a_column():
    v = RowView(pa.table(dict(clear=pa.array([1.,0.]), probs=pa.FixedSizeListArray.from_arrays(pa.array(np.array([.1,.9], 'f2')), 1))), ['clear'])
    assert count_where(make_where(classes=['clear'], probs=dict(clear=.5)), v)[0].tolist()==[False,True]
    assert count_where(make_where(classes=['clear'], clear=.5), v)[0].tolist()==[True,False]

def test_chips_without_probabilities_are_told(world):
    "Where an encoder has left none, no class is found, and the answer says why"
    s = Searcher(world/'schemas/land')
    rows, n = s.collection.rows, len(s.view)
    def with_probs(known):
        p = pa.array([[.7,.7,.7] if k else None for k in known], pa.list_(pa.float32(), 3)).cast(pa.list_(pa.float16(), 3))
        s.view = RowView(rows.set_column(rows.column_names.index('probs'), 'probs', p), CLASSES)
        return table(s).chip
    with_probs([False]*n)
    with pytest.raises(NothingFound, match=rf'with probabilities of the classes: 0 \({n} not known\)\); the encoder has left none') as e: s.search(classes='bright')
    assert 'query itself' not in str(e.value)
    chips = with_probs([i<4 for i in range(n)])
    for chip,left in ((chips[0], 3), (chips[9], 4)):
        r = s.search(chip, classes='bright', k=99)
        assert r.attrs['funnel']==[['all chips',n,0], ['beside the query itself',n-1,0], ['with probabilities of the classes',left,n-1-left]] and len(r)==left
    r = s.search(chips[0], k=3, where=f'chip={chips[0]}', empty='return')
    assert r.attrs['funnel'][-1]==['beside the query itself',0,0]
    with pytest.raises(NothingFound, match='loosen the filters'): s.search(chips[0], where=f'chip={chips[0]}')

def test_a_chip_that_is_not_there_is_answered_with_its_neighbours(s):
    t = table(s)
    gap = next(p for p in t.place if not (t.chip==f'{p}_10300100AAAA0003.jpg').any())
    with pytest.raises(InputError, match=f'last as {gap}_10300100AAAA0002.jpg of 2021-08-22|nearest in time as {gap}'): s.search(f'{gap}_10300100AAAA0003.jpg')

def test_nothing_left_tells_which_filter_took_what(s):
    t = table(s)
    with pytest.raises(NothingFound) as e: s.search(t.chip[0], where='valid>=0.6 and clear>=0.7 and date>=2030')
    f = e.value.funnel
    clear = (t.valid>=.6)&(t.clear>=.7)
    assert [x[:2] for x in f]==[['all chips',len(t)], ['valid>=0.6',(t.valid>=.6).sum()], ['clear>=0.7',clear.sum()], ['date>=2030',0]]
    assert f[2][2]==((t.valid>=.6)&t.clear.isna()).sum()>0 and "loosen 'date>=2030'" in str(e.value)
    r = s.search(t.chip[0], where='date>=2030', empty='return')
    assert len(r)==0 and r.crs.to_epsg()==4326 and list(r.columns)==list(s.search(t.chip[0]).columns)

def test_an_empty_collection_says_so(world, tmp_path):
    b = make_bundle(dict(registered='tiny-search', size=32, classes=CLASSES), tmp_path/'b')
    f = next((world/'embeddings').rglob('*.parquet'))
    t = pq.read_table(f).slice(0,0)
    out = tmp_path/'e/z17'/f.parent.name/f.name
    out.parent.mkdir(parents=True)
    m = orjson.loads(t.schema.metadata[b'imagesim'])|dict(encoder_hash=b.hash)
    pq.write_table(t.replace_schema_metadata({'imagesim':orjson.dumps(m)}), out)
    build_schema('none', b, tmp_path/'e', root=tmp_path/'schemas')
    with pytest.raises(InputError, match='holds no chips'): Searcher(tmp_path/'schemas/none')
    with pytest.raises(MissingError): Searcher(tmp_path/'schemas/nowhere')
    with pytest.raises(InputError, match="no collection 'x'"): Searcher(world/'schemas/land', 'x')

def test_a_collection_alone_answers_all_but_pictures(world):
    s = Searcher(open_schema(world/'schemas/land').collection())
    assert len(s.search(table(s).chip[0], k=4))==4
    with pytest.raises(InputError, match='needs the encoder'): s.search(image=jpg(picture(1)))

def test_vectors_before_the_projection_are_projected(world, tmp_path):
    enc = load_encoder(world/'bundle')
    v = enc.encode(np.stack([np.asarray(picture(i, 32)).transpose(2,0,1) for i in range(120)]))[0]
    b = make_bundle(world/'bundle', tmp_path/'b', projection=fit_pca(v, 12))
    small = load_encoder(b)
    places = around(13.6, 45.02, 6)
    w = small.encode(np.stack([np.asarray(picture(i, 32)).transpose(2,0,1) for i in range(36)]))
    for cell in {p.parent(12) for p in places}:
        at = [i for i,p in enumerate(places) if p.parent(12)==cell]
        write_cell(tmp_path/'e', [places[i] for i in at], '10300100AAAA0001', w[0][at], w[1][at], b.hash, np.random.default_rng(0))
    build_schema('small', b, tmp_path/'e', root=tmp_path/'schemas')
    s = Searcher(tmp_path/'schemas/small')
    r = s.search(vector=v[5], k=1)
    assert s.collection.dim==12 and r.place[0]==places[5].id and r.score[0]>.999
    assert s.search(image=jpg(picture(5, 32), 'PNG'), k=1).place[0]==places[5].id

def test_fewer_numbers_from_the_same_embeddings(world, tmp_path, bucket):
    "A projected schema answers as projecting by hand would: by chip, by picture, by a long vector, and on another machine"
    made = lambda: build_schema('few', world/'bundle', world/'embeddings', root=tmp_path/'schemas', pca=10)
    assert made().exit_code==0 and made().done==0
    s, long = Searcher(tmp_path/'schemas/few', chips=world/'chips'), open_schema(world/'schemas/land').collection()
    names = s.collection.rows['chip'].to_pylist()
    assert len(s.collection)==len(long) and s.collection.dim==10 and s.schema.encoder.dim==10
    p = read_projection(tmp_path/'schemas/few/encoder/projection.safetensors')
    by_hand = p.apply(long.vectors(long.find(names)))
    assert np.allclose(s.collection.vectors(slice(None)), by_hand, atol=2e-3)
    row = next(i for i,n in enumerate(names) if (world/'chips/33'/n).is_file())
    best = np.argsort(-(by_hand@by_hand[row]), kind='stable')[:8]
    found = s.search(names[row], k=7)
    assert np.allclose(found.score, (by_hand@by_hand[row])[best[best!=row][:7]], atol=5e-3)
    assert s.search(vector=long.vectors(long.find([names[row]]))[0], k=1).score[0]>.999
    seen = s.search(image=(world/'chips/33'/names[row]).read_bytes(), k=1)
    assert seen.score[0]>.99 # several places show this picture
    with pytest.raises(InputError, match='vectors of 10 numbers, not 6'): build_schema('few', world/'bundle', world/'embeddings', root=tmp_path/'schemas', pca=6)
    with pytest.raises(InputError, match='projects to 10 numbers already'): build_schema('x', tmp_path/'schemas/few/encoder', world/'embeddings', root=tmp_path/'schemas', pca=6)
    with pytest.raises(InputError, match='project to fewer|allow 1 to'): build_schema('y', world/'bundle', world/'embeddings', root=tmp_path/'schemas', pca=9999)
    assert not (tmp_path/'schemas/x').exists() and not (tmp_path/'schemas/y').exists()
    push_schema(tmp_path/'schemas/few', f'{bucket}/schemas')
    pull_schema(f'{bucket}/schemas/few', tmp_path/'far')
    assert verify_schema(tmp_path/'far/few').exit_code==0
    assert Searcher(tmp_path/'far/few').search(names[row], k=7).chip.tolist()==found.chip.tolist()

# --- what comes out

def test_geojson_is_whole_and_credited(s, tmp_path, bucket):
    r = s.search(table(s).chip[0], k=9)
    write_results(r, tmp_path/'r.geojson')
    d = json.loads((tmp_path/'r.geojson').read_text())
    assert d['credits']==['made up <b>here</b>','encoder by nobody'] and [f['id'] for f in d['features']]==r.chip.tolist() and d['score'].startswith('cosine')
    for f,g in zip(d['features'], r.geometry):
        assert shapely.from_geojson(json.dumps(f['geometry'])).symmetric_difference(g).area<1e-9
    assert d['features'][0]['properties']['score']==r.score[0]
    odd = r.copy()
    odd['chip'] = [object()]*9
    with pytest.raises(Exception): write_results(odd, tmp_path/'r.geojson')
    assert json.loads((tmp_path/'r.geojson').read_text())==d and [p.name for p in tmp_path.iterdir()]==['r.geojson']
    write_results(r, f'{bucket}/r.geojson')
    write_results(s.search(table(s).chip[0], zone=2, empty='return'), tmp_path/'none.geojson')
    assert json.loads((tmp_path/'none.geojson').read_text())['features']==[]
    import geopandas as gpd
    assert len(gpd.read_file(tmp_path/'r.geojson'))==9

@pytest.mark.filterwarnings('ignore:.*on the sheet missing')
def test_sheets_survive_lost_pictures(s, tmp_path):
    t = table(s)
    r = s.search(t.chip[t.zone==34].iloc[0], k=20, zone=34) # the pictures of zone 34 are not there
    with pytest.warns(UserWarning, match='21 of 21 pictures on the sheet missing, looked for in .*chips'): im = s.contact_sheet(r, tmp_path/'s.png')
    assert Image.open(tmp_path/'s.png').size==im.size
    inner = s.search(t.chip[t.zone==33].iloc[0], k=3, zone=33)
    with warnings.catch_warnings():
        warnings.simplefilter('error') # nothing is missing here
        a = np.asarray(s.contact_sheet(inner))
    assert tuple(a[27,40])==(232,89,12) and tuple(a[27,40+133])!=(232,89,12) # the query first, in its frame
    for q in (dict(classes='bright'), dict(like=t.chip[:9].tolist(), unlike=t.chip[20:22].tolist()), dict(vector=np.ones(48)), dict(image=jpg(picture(3)))): assert s.contact_sheet(s.search(k=4, zone=33, **q)).width>300
    with pytest.raises(ImagesimError): s.contact_sheet(r, tmp_path/'no'/'..'/'')
    assert s.contact_sheet(s.search(t.chip[0], zone=2, empty='return')).height>100

@pytest.mark.filterwarnings('ignore:.*on the sheet missing')
def test_a_sheets_name_is_looked_at_first(s, tmp_path, bucket):
    for name in ('s.xyz', 's', 's.png.txt'):
        with pytest.raises(InputError, match='written as .png or .jpg'): search(tmp_path/'no such schema', chip='x', sheet=tmp_path/name)
        with pytest.raises(InputError, match='written as .png or .jpg'): s.contact_sheet(s.search(table(s).chip[0], k=1), tmp_path/name)
    from imagesim.infra import read_bytes
    im = s.contact_sheet(s.search(table(s).chip[0], k=1), f'{bucket}/s.JPG')
    assert Image.open(io.BytesIO(read_bytes(f'{bucket}/s.JPG'))).size==im.size and not list(tmp_path.iterdir())

EVIL = '{{ 7*191 }}{% set x = 1 %}{# gone #}</script><script>alert(1)</script>`${alert(2)}`<img src=x onerror=alert(3)>\\u0041 $x_{$ $\\bad$'

def test_texts_of_others_are_shown_and_not_run(s, tmp_path):
    "Credits, the name of a picture, a chip's name: in a web page none is a template, a script or markup, in a figure none is a formula"
    import html
    r = s.search(table(s).chip[0], k=3)
    r.attrs['credits'] = [EVIL]
    r.attrs['query']['text'] = r.attrs['query']['like'][0]['name'] = EVIL
    r.loc[0,'chip'] = EVIL
    page = results_map(r).get_root().render()
    for run in ('1337', '<script>alert', '</script><script>alert', '${alert', '<img', '{%', '{#', '{{ 7'): assert run not in page, run
    assert page.count('alert(1)')==5 and EVIL in html.unescape(page) # a chip, a query, the title and the credits; of the chip also in the JSON
    fig = s.visualize_results(r)
    fig.savefig(tmp_path/'v.png')
    assert EVIL in fig._supxlabel.get_text().replace(r'\$', '$') and fig.axes[0].get_title(loc='left')+fig.axes[0].get_title()!=''
    odd = tmp_path/'a$b_{c$.jpg'
    odd.write_bytes(jpg(picture(3)))
    s.visualize_results(s.search(image=odd, k=3)).savefig(tmp_path/'w.png')

def test_a_map_holds_no_markup_from_outside(s):
    html = results_map(s.search(table(s).chip[0], k=3)).get_root().render()
    assert '<b>here</b>' not in html and '&lt;b&gt;here' in html and 'tile.openstreetmap' not in html

@pytest.mark.filterwarnings('ignore:.*on the sheet missing')
def test_search_in_one_call(world, tmp_path, monkeypatch):
    monkeypatch.setenv('IMAGESIM_DATA_ROOT', str(world))
    chip = table(Searcher('land')).chip[0]
    r = search('land', chip=chip, k=6, where='valid>=0.5', out=tmp_path/'r.geojson', sheet=tmp_path/'s.png')
    assert len(r)==6 and (tmp_path/'r.geojson').is_file() and Image.open(tmp_path/'s.png').width>500
    assert r.chip.tolist()==search(world/'schemas/land', chip=chip, k=6, where='valid>=0.5').chip.tolist()
    assert isinstance(Searcher('land').store, ChipStore)

def test_make_where_joins_line_and_keywords(s):
    w = make_where('valid>=0.6', CLASSES, since='2020-02', until=datetime.date(2021,12,31), zone=33, off_nadir=40, catalog_id=['10300100AAAA0002'], one_a_place=True)
    keep, funnel = count_where(w, s.view)
    t = table(s)
    assert keep.tolist()==((t.valid>=.6)&(t.zone==33)&(t.off_nadir<=40)&(t.catalog_id=='10300100AAAA0002')).tolist() and len(funnel)==7
    assert w.one_a_place and parse_where(str(parse_where('(valid>0.5 or clear>0.5) and one_a_place')))
