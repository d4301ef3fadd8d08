"""Looking at labels: numbers against pandas, every form of input, figures by their artists, foreign text on maps, shifts that are known"""
import math, resource, subprocess, sys
from pathlib import Path

import geopandas as gpd, matplotlib, numpy as np, orjson, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, shapely
from hypothesis import given, settings, strategies as st

matplotlib.use('agg')
from conftest import ROOT
from imagesim.ard import Cell, find_tiles, reproject
from imagesim.chip import chip_ard
from imagesim.classes import read_schema
from imagesim.element import OSM_CREDIT, osm_path, write_osm
from imagesim.explore import (LabelFrame, chips_at, chips_of_class, class_colours, count_labels, coverage, draw_osm, explore_map, label_cooccurrence, label_correlation, label_distribution, label_frame, label_places, label_rarity, labels_of, place_states, tag_counts,
    visualize_class_map, visualize_classes_per_place, visualize_cooccurrence, visualize_coverage, visualize_image, visualize_label_corr, visualize_label_dist,
    visualize_tags)
from imagesim.extract import extract_cells
from imagesim.feature import cell_elements, read_osm
from imagesim.infra import CorruptError, InputError, MissingError, join, write_bytes
from imagesim.offset import edge_field, estimate_offset, find_peak, offset_table, shift_surface, visualize_offset
from imagesim.read import ChipStore
from imagesim.synth import make_delivery

CELLS = 'Z33-031111123030', 'Z33-031111123031', 'Z33-031111123120'
CLASSES = ['water', 'forest', 'houses', 'odd "name"; drop', 'my own']


def random_table(rows, seed=0, classes=CLASSES, unmapped=.3):
    "Chips with random states, some classes related"
    rng = np.random.default_rng(seed)
    places = [c.id for cell in CELLS for c in Cell.parse(cell).children(17)]
    names = [f'{places[i%len(places)]}_10300100AAAA{i//len(places):04d}.jpg' for i in range(rows)]
    base = rng.random(rows)
    cols = {c:pd.array(((base+rng.random(rows))/2<rng.uniform(.2,.6)).astype(int), 'Int8') for c in classes}
    t = pd.DataFrame({'Feature':names, **cols})
    for c in classes: t.loc[rng.random(rows)<unmapped, c] = pd.NA
    return t


def write_labels(table, folder, classes=CLASSES, schema='land13'):
    "Write a chip table as label files, a file a cell: a measure, a state and a time a class"
    t = table.assign(place=table.Feature.str.partition('_')[0]).sort_values('place')
    for cell,part in t.groupby(t.place.str[:16]):
        cols = {'place':pa.array(part.place.tolist()), 'lon':pa.array(np.zeros(len(part))), 'lat':pa.array(np.zeros(len(part)))}
        for c in classes:
            cols |= {c:pa.array(part[c].fillna(0).to_numpy(float)*.5, pa.float32()), f'{c}_state':pa.Array.from_pandas(part[c], type=pa.int8()), f'{c}_newest':pa.nulls(len(part), pa.timestamp('s'))}
        out = pa.BufferOutputStream()
        meta = orjson.dumps(dict(schema=schema, classes=classes, attribution='© somebody'))
        pq.write_table(pa.table(cols).replace_schema_metadata({'imagesim':meta}), out)
        write_bytes(join(folder, 'z17', 'zone=33', f'{cell[4:]}.parquet'), out.getvalue().to_pybytes())


# ---------------------------------------------------------------------------------------------------------------- numbers
states = st.sampled_from([1, 0, None])

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(states, states, states), min_size=1, max_size=60))
def test_statistics_equal_pandas(rows):
    t = pd.DataFrame({'Feature':[f'Z33-03111112303000{i:03d}_A.jpg' if set(f'{i:03d}')<=set('0123') else f'x{i}.jpg' for i in range(len(rows))]})
    for j,c in enumerate('abc'): t[c] = pd.array([r[j] for r in rows], 'Int8')
    c, x = count_labels(t), t[['a','b','c']].astype('Float64')
    d = label_distribution(c)
    assert d.present.tolist()==x.eq(1).sum().tolist() and d.absent.tolist()==x.eq(0).sum().tolist() and d.unmapped.tolist()==x.isna().sum().tolist()
    np.testing.assert_allclose(d.share, x.mean().to_numpy(float, na_value=np.nan), equal_nan=True)
    want = x.astype('float64').corr()
    np.testing.assert_allclose(label_correlation(c), want, atol=1e-9, equal_nan=True)
    assert (np.diag(label_cooccurrence(c))==d.present).all()
    both = pd.DataFrame({b:{a:(x[a].eq(1)&x[b].eq(1)).sum() for a in x} for b in x})
    assert (label_cooccurrence(c).to_numpy()==both.to_numpy()).all()
    for a in x:
        for b in x:
            given_a = x[b][x[a].eq(1).fillna(False)].dropna()
            got = label_cooccurrence(c, share=True).loc[a,b]
            assert math.isnan(got) if not len(given_a) else got==pytest.approx(given_a.mean())
    n = x.eq(1).sum(axis=1).value_counts()
    assert {i:v for i,v in enumerate(c.many) if v}==n.to_dict()
    assert c.cells['rows'].sum()==t.Feature.str.match('^Z').sum()


def test_rarity():
    t = random_table(5000)
    r = label_rarity(t)
    n = t[CLASSES].eq(1).sum()
    assert r.present.is_monotonic_increasing and (r.present==n[r.index]).all()
    assert r.effective[r.index[0]]==pytest.approx((1-.999**n.min())/.001, abs=.06) and r.imbalance.max()==pytest.approx(n.max()/n.min(), abs=.06)
    assert r.weight.mean()==pytest.approx(1, abs=.01) and r.weight.is_monotonic_decreasing
    cell = t.Feature.str[:16]
    for c in CLASSES: assert r.top_cell[c]==pytest.approx(t[c].eq(1).groupby(cell).sum().max()/n[c]) and r.cells[c]==3


# ------------------------------------------------------------------------------------------------------------------ inputs
def same(a, b):
    return a.classes==b.classes and a.rows==b.rows and all((getattr(a,k)==getattr(b,k)).all() for k in ('both','one','known','many','unmapped')) and a.cells.equals(b.cells)

def forms(table, folder):
    "The same table in every form"
    write_labels(table, join(folder,'labels/land13'))
    out = pa.BufferOutputStream(); pq.write_table(pa.Table.from_pandas(table, preserve_index=False), out)
    write_bytes(join(folder,'sparse.parquet'), out.getvalue().to_pybytes())
    write_bytes(join(folder,'t.csv'), table.to_csv(index=False).encode())
    return dict(labels=join(folder,'labels/land13'), root=join(folder,'labels'), glob=join(folder,'labels/*/z17/zone=33/*.parquet'), parquet=join(folder,'sparse.parquet'),
                csv=join(folder,'t.csv'), dataset=folder)

def test_all_forms_agree(tmp_path):
    t = random_table(3*1024)
    want = count_labels(t)
    frames = {'bool': t.dropna().assign(**{c:t[c].dropna().astype(bool) for c in CLASSES}), 'arrow':pa.Table.from_pandas(t, preserve_index=False), 'float':t.astype(dict.fromkeys(CLASSES,'Float64')),
              'object':t.assign(**{c:t[c].astype(object).where(t[c].notna(), None) for c in CLASSES})}
    assert same(count_labels(frames.pop('bool')), count_labels(t.dropna()))
    for name,data in {**frames, **forms(t, str(tmp_path/'d'))}.items(): assert same(count_labels(data), want), name

def test_forms_in_a_bucket_agree(bucket):
    t = random_table(1024)
    want = count_labels(t)
    for name,data in forms(t, f'{bucket}/d').items(): assert same(count_labels(data), want), name
    with pytest.raises(MissingError, match='nothing there'): count_labels(f'{bucket}/e')

def test_labels_of_chips_are_a_form_too():
    f = label_frame(pd.DataFrame({'chip':['Z33-03111112303000000_A.jpg'], 'place':['Z33-03111112303000000'], 'date':[pd.Timestamp('2020-01-01')], 'lon':[1.], 'lat':[2.],
        'water':[.4], 'water_state':pd.array([1],'Int8'), 'water_newest':[pd.NaT]}))
    assert (f.key, f.unit, f.classes, f.has_measures)==('chip', 'chip', ['water'], True)

def test_an_all_unmapped_class_in_a_csv(tmp_path):
    (tmp_path/'t.csv').write_text('Feature,water,forest\na.jpg,,1\nb.jpg,,0\n')
    assert label_distribution(tmp_path/'t.csv').unmapped.tolist()==[2,0]

@pytest.mark.parametrize('data,error,says', [
    (pd.DataFrame({'x':[1]}), InputError, 'no column `Feature`'), (pd.DataFrame({'Feature':['a']}), InputError, 'no class in it'),
    (pd.DataFrame({'place':['a'], 'water':[.2]}), InputError, 'NAME_state'), (pd.DataFrame({'Feature':[], 'water':[]}), InputError, 'no row'),
    (pd.DataFrame({'Feature':['a'], 'water':[2]}), InputError, 'class water holds 2'), (pd.DataFrame({'Feature':['a'], 'water':['deep']}), InputError, 'class water holds deep'),
    (pd.DataFrame({'Feature':['a'], 'present':[['x']], 'unmapped':[['y']]}), InputError, 'dense encoding'), (7, InputError, 'not int'),
    (pd.DataFrame({'Feature':['a'], 'when':[pd.Timestamp('2020-01-01')]}), InputError, "column 'when' holds TIMESTAMP")])
def test_wrong_tables_say_so(data, error, says):
    with pytest.raises(error, match=says): count_labels(data)

def test_wrong_files_say_so(tmp_path):
    for name,text in (('bad.parquet','hello, hello, hello'), ('labels.txt','x')): (tmp_path/name).write_text(text)
    with pytest.raises(CorruptError, match='bad.parquet: not a Parquet file'): count_labels(tmp_path/'bad.parquet')
    with pytest.raises(InputError, match='read from .parquet and .csv'): count_labels(tmp_path/'labels.txt')
    (tmp_path/'empty').mkdir()
    with pytest.raises(MissingError, match='write labels with'): count_labels(tmp_path/'empty')
    for schema in ('land13','rare'): write_labels(random_table(1024), str(tmp_path/'labels'/schema))
    with pytest.raises(InputError, match='several kinds .land13.z17, rare.z17.'): count_labels(tmp_path/'labels')
    bad = pq.read_table(next((tmp_path/'labels/land13').rglob('*.parquet'))).drop_columns(['water','water_state'])
    pq.write_table(bad, tmp_path/'labels/land13/z17/zone=33/031111123031.parquet')
    with pytest.raises(CorruptError, match='same columns'): count_labels(tmp_path/'labels/land13')

def test_labels_of_two_schemas_are_not_mixed(tmp_path):
    "files of one folder, made with different thresholds under one name, or damaged"
    write_labels(random_table(2*1024), str(tmp_path/'l'))
    a, b = sorted((tmp_path/'l').rglob('*.parquet'))
    note = orjson.loads(pq.read_schema(b).metadata[b'imagesim'])
    def mark(path, text): pq.write_table(pq.read_table(path).replace_schema_metadata({'imagesim':text}), path)
    mark(a, orjson.dumps(note|dict(schema_hash='a'*16))); mark(b, orjson.dumps(note|dict(schema_hash='b'*16)))
    with pytest.raises(InputError, match='another class schema'): count_labels(tmp_path/'l')
    mark(b, orjson.dumps(note|dict(schema_hash='a'*16)))
    assert count_labels(tmp_path/'l').rows==2048
    for text in (b'[]', b'{', b'{"attribution": 3}'):
        mark(a, text)
        with pytest.raises(CorruptError, match='metadata is damaged'): count_labels(tmp_path/'l')

@pytest.mark.parametrize('name', ['br[1]ck', 'st*r', 'qu?', '[a]/x'])
def test_folders_named_like_patterns(tmp_path, name):
    t = random_table(1024)
    want = count_labels(t)
    for form,data in forms(t, str(tmp_path/name)).items():
        if form!='glob': assert same(count_labels(data), want), form

@pytest.mark.parametrize('folder', ['plain', 'br[1]ck'])
def test_encodings_of_csv(tmp_path, folder):
    (tmp_path/folder).mkdir()
    p = tmp_path/folder/'t.csv'
    p.write_bytes('\ufeffFeature,forêt\na.jpg,1\n'.encode())
    assert label_distribution(p).present.to_dict()=={'forêt':1}
    p.write_bytes('Feature,forêt\na.jpg,1\n'.encode('latin-1'))
    with pytest.raises(CorruptError, match='t.csv'): count_labels(p)

def test_many_rows_take_little_memory(tmp_path):
    for cell in CELLS[:2]: write_labels(random_table(1024), str(tmp_path/'one'))
    t = pq.read_table(next((tmp_path/'one').rglob('*.parquet')))
    (tmp_path/'many/z17/zone=33').mkdir(parents=True)
    cells = Cell.parse('Z33-031111123').parent(8).children(12)[:200]
    own = [c.id for c in cells[0].children(17)]
    for c in cells: pq.write_table(t.set_column(0, 'place', pa.array([c.id+p[16:] for p in own])), tmp_path/f'many/z17/zone=33/{c.quadkey}.parquet')
    code = f'''
import resource
from imagesim.explore import count_labels, visualize_class_map, visualize_label_dist
count_labels({str(tmp_path/'one')!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
c = count_labels({str(tmp_path/'many')!r})
visualize_class_map({str(tmp_path/'many')!r}, 'water', most=256)
print(c.rows, len(c.cells), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)//1024)'''
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert p.returncode==0, p.stderr
    rows, n, mb = map(int, p.stdout.split())
    assert (rows, n)==(204_800, 200) and mb<250


# ----------------------------------------------------------------------------------------------------------------- figures
def texts(fig): return [t.get_text() for t in fig.findobj(matplotlib.text.Text) if t.get_text()]

def test_distribution_figure():
    t = random_table(2000)
    fig = visualize_label_dist(t)
    pie, bars = fig.axes
    colours, d = class_colours(CLASSES), label_distribution(t)
    order = d.present.sort_values(ascending=False).index
    assert [matplotlib.colors.to_hex(w.get_facecolor()) for w in pie.patches]==[matplotlib.colors.to_hex(colours[c]) for c in order]
    assert [x.get_text().split('  ')[0] for x in pie.get_legend().get_texts()]==list(order)
    assert [x.get_text() for x in bars.get_yticklabels()]==list(order[::-1]) and [x.get_text() for x in bars.get_legend().get_texts()]==['present','absent','unmapped']
    widths = np.array([p.get_width() for p in bars.patches[:15]]).reshape(3,5)
    np.testing.assert_allclose(widths.sum(0), 100)
    np.testing.assert_allclose(widths[0], d.present[order[::-1]]/2000*100)
    assert OSM_CREDIT in texts(fig) and matplotlib.pyplot.get_fignums()==[]

def test_no_credit_where_nobody_is_to_be_credited():
    assert OSM_CREDIT not in texts(visualize_label_dist(random_table(50).assign(Feature=[f'{i}.jpg' for i in range(50)])))

def test_schema_colours_are_used():
    s = read_schema('land13')
    assert class_colours(s.names)==s.colours and class_colours(['water','buildings?'])['water']==s.colours['water']
    many = class_colours([f'c{i}' for i in range(40)])
    assert len(set(many.values()))>30

def test_heat_maps():
    t = random_table(1000)
    fig = visualize_label_corr(t)
    mesh = fig.axes[0].collections[0]
    assert mesh.get_clim()==(-1,1) and mesh.get_cmap().name=='RdYlBu' and [x.get_text() for x in fig.axes[0].get_xticklabels()]==CLASSES
    np.testing.assert_allclose(mesh.get_array().reshape(5,5), label_correlation(t))
    mesh = visualize_cooccurrence(t).axes[0].collections[0]
    np.testing.assert_allclose(mesh.get_array().reshape(5,5), label_cooccurrence(t, share=True)*100)
    dull = pd.DataFrame({'Feature':['a','b'], 'x':[1,1], 'y':pd.array([None,None],'Int8')})
    with pytest.raises(InputError, match='nothing can be correlated'): visualize_label_corr(dull)
    many, gone = visualize_classes_per_place(t).axes
    assert sum(p.get_height() for p in many.patches)==pytest.approx(100)==sum(p.get_height() for p in gone.patches)

def test_all_unmapped(tmp_path):
    t = random_table(100, unmapped=1.1)
    assert label_distribution(t).unmapped.tolist()==[100]*5 and label_rarity(t).present.sum()==0
    with pytest.raises(InputError, match='100 of 100 chips are unmapped in all'): visualize_label_dist(t)
    assert visualize_label_dist(t, 'bars') and visualize_class_map(t, 'water')
    with pytest.raises(InputError, match='is present nowhere'): chips_of_class(t, 'water', ChipStore(tmp_path))

def test_class_map(tmp_path):
    t = random_table(3*1024)
    write_labels(t, str(tmp_path/'labels'))
    fig = visualize_class_map(tmp_path/'labels', 'water', CELLS[0])
    ax, pic = fig.axes[0], fig.axes[0].images[0].get_array()
    b = Cell.parse(CELLS[0]).bounds
    np.testing.assert_allclose(fig.axes[0].images[0].get_extent(), [b.left/1000, b.right/1000, b.bottom/1000, b.top/1000])
    assert pic.shape==(32,32,3) and [x.get_text() for x in ax.get_legend().get_texts()]==['present','absent','unmapped'] and '(km)' in ax.get_xlabel()
    water = np.array(matplotlib.colors.to_rgb(read_schema('land13').colours['water']))
    here = t[t.Feature.str.startswith(CELLS[0])]
    for place,state in zip(here.Feature.str.partition('_')[0], here.water):
        c, home = Cell.parse(place), Cell.parse(CELLS[0])
        assert np.allclose(pic[c.y-home.y*32, c.x-home.x*32], water)==(not pd.isna(state) and state==1)
    assert '© somebody' in texts(fig)
    assert f'present in {int((here.water==1).sum())} of {int(here.water.notna().sum())} known places' in ax.get_title(loc='left')
    coarse = visualize_class_map(tmp_path/'labels', 'water', most=16)
    assert max(coarse.axes[0].images[-1].get_array().shape)<=16 and 'per square of' in coarse.axes[0].get_title(loc='left')
    measure = visualize_class_map(tmp_path/'labels', 'water', 33, show='measure')
    assert measure.axes[1].get_ylabel()=='% of the place' and measure.axes[0].images[-1].get_array().max()==pytest.approx(50)
    small = visualize_class_map(tmp_path/'labels', 'water', CELLS[0]+'01')
    assert small.axes[0].images[0].get_array().shape[:2]==(8,8)

def test_map_arguments(tmp_path):
    t = random_table(1024)
    for fn,says in ((lambda: visualize_class_map(t, 'wood'), "no class 'wood'"), (lambda: visualize_class_map(t, 'water', 'Z33-031111123032'), 'labels lie in Z33-031111123030'),
                    (lambda: visualize_class_map(t, 'water', show='measure'), 'holds no measures'), (lambda: visualize_class_map(pd.concat([t, t.assign(Feature=t.Feature.str.replace('Z33','Z34'))]), 'water'), 'where=33'),
                    (lambda: visualize_class_map(t.assign(Feature='a.jpg'), 'water'), 'no address'), (lambda: place_states(t.assign(Feature='a.jpg'), 'water'), 'no address')):
        with pytest.raises(InputError, match=says): fn()

def test_place_states_of_several_chips():
    t = pd.DataFrame({'Feature':[f'{CELLS[0]}00000_{c}.jpg' for c in 'ABC'], 'water':pd.array([0,1,None],'Int8'), 'forest':pd.array([0,None,None],'Int8'), 'bare':pd.array([None]*3,'Int8')})
    assert [place_states(t, c).state.tolist() for c in ('water','forest')]==[[1],[0]] and place_states(t, 'bare').state.isna().all()

def test_southern_map():
    "Northings of the south carry ten thousand kilometres"
    home = Cell(60, '211111123030')
    t = pd.DataFrame({'Feature':[f'{c.id}_A.jpg' for c in home.children(17)], 'water':1})
    b = home.bounds
    np.testing.assert_allclose(visualize_class_map(t, 'water').axes[0].images[0].get_extent(), [b.left/1000, b.right/1000, b.bottom/1000, b.top/1000])


# ------------------------------------------------------------------------------------------------------- chips, OSM, delivery
@pytest.fixture(scope='module')
def town(tmp_path_factory):
    "A painted delivery with chips, OSM files and labels"
    root = tmp_path_factory.mktemp('town')
    d = make_delivery(root, size=5, dates=2, seed=0)
    chip_ard(d.ard, root/'chips/33', proc=1)
    found = extract_cells(d.pbf, d.cells, root/'work')
    for c in d.cells: write_osm(osm_path(d.ard, c), c, cell_elements(found[c], c), dict(source='extract'))
    label_places(d.ard, 'land13', out=root/'labels', proc=1)
    return d, ChipStore(root/'chips/33'), root/'labels/land13'

def test_chips_of_a_class(town):
    d, store, labels = town
    sheet = chips_of_class(labels, 'forest', store, n=4, columns=4, px=32)
    assert sheet.width==4*36-4 and np.asarray(sheet)[22:54].std()>5
    assert np.array_equal(sheet, chips_of_class(labels, 'forest', store, n=4, columns=4, px=32)), 'the same seed draws the same'
    place = store.names()[0].partition('_')[0]
    assert set(chips_at(store, [place]))=={n for n in store.names() if n.startswith(place)}
    with pytest.raises(InputError, match="no class 'forrest'; did you mean 'forest'"): chips_of_class(labels, 'forrest', store)
    with pytest.raises(MissingError, match='cut them with'): chips_of_class(labels, 'forest', ChipStore(d.root+'/nowhere'))

def test_a_chip_and_its_labels(town):
    d, store, labels = town
    name = store.names(valid=1.)[0]
    row = labels_of([name], labels, undated='keep').iloc[0]
    fig = visualize_image(name, labels, store, credit='painted')
    want = {c:row[f'{c}_state'] for c in read_schema('land13').names}
    tags = {t.get_text().split('  ')[0]:t.get_bbox_patch() for t in fig.axes[1].texts if t.get_bbox_patch()}
    assert set(tags)=={c for c,v in want.items() if pd.isna(v) or v==1}
    for c,box in tags.items():
        colour = matplotlib.colors.to_rgba(read_schema('land13').colours[c])
        assert box.get_edgecolor()==colour and (box.get_facecolor()==colour)==(not pd.isna(want[c]))
    assert f'painted · {OSM_CREDIT}' in texts(fig) and fig.axes[0].images[0].get_array().shape[:2]==(512,512)
    with pytest.raises(InputError, match='no row for'): visualize_image('Z33-03111112300000000_A.jpg', labels, store)

def test_osm_over_a_chip(town):
    d, store, _ = town
    features, s = read_osm(osm_path(d.ard, d.cells[0])), read_schema('land13')
    hits = s.match(features)
    for name in store.names(valid=1.)[:3]:
        inside = features.intersects(Cell.parse(name.partition('_')[0]).geometry()).to_numpy()
        fig = draw_osm(name, d.ard, store)
        shown = {x.get_text().rpartition(' ')[0]:h for x,h in zip(fig.axes[0].get_legend().get_texts(), fig.axes[0].get_legend().get_lines())}
        assert set(shown)-{'no class'}=={c for k,c in enumerate(s.names) if (hits[:,k]&inside).any()}
        assert all(h.get_color()==s.colours[c] for c,h in shown.items() if c in s.colours)
        assert any(OSM_CREDIT in t for t in texts(fig)) and fig.axes[0].get_xlabel()==''
    with pytest.raises(MissingError, match='fetch it with'): draw_osm(name, d.root+'/elsewhere', store)

def test_tags_and_coverage(town):
    d, _, _ = town
    t = tag_counts(d.ard)
    assert (t.total==t.nodes+t.ways+t.relations).all() and t.total.is_monotonic_decreasing
    fig = visualize_tags(t, top=5)
    assert [x.get_text() for x in fig.axes[0].get_yticklabels()][::-1]==[f'{k}={v}' for k,v in zip(t.key[:5],t.value[:5])] and OSM_CREDIT in texts(fig)
    visualize_tags(pd.DataFrame(dict(key=['name'], value=['a$b$_{'], nodes=[1], ways=[0], relations=[0]))).canvas.draw() # not mathematics
    c = coverage(d.ard)
    assert c.catalog_id.tolist()==[a.catalog_id for a in d.acquisitions] and c.off_nadir.tolist()==[pytest.approx(a.off_nadir, abs=.1) for a in d.acquisitions]
    fig = visualize_coverage(c)
    assert sum(len(o.get_offsets()) for o in fig.axes[0].collections if hasattr(o,'get_offsets') and o.get_zorder()==3)==2 and 'off nadir' in fig.axes[0].get_ylabel()
    with pytest.raises(InputError, match='no acquisition has a date'): visualize_coverage(c.assign(date=None))
    with pytest.raises(InputError, match='not a tile table'): coverage(pd.DataFrame({'x':[1]}))
    with pytest.raises(MissingError, match='no osm_data.json'): tag_counts(Path(d.root)/'truth')

EVIL = ['<script>alert(1)</script>', '"><img src=x onerror=alert(2)>', '</script><svg onload=alert(3)>', "'+alert(4)+'", '{{ 7*7 }}', '`${alert(5)}`', '<b>bold</b>']

def test_foreign_text_never_becomes_html():
    g = gpd.GeoDataFrame(dict(element=EVIL, kind='point', tags=[{e:e, 'name':e} for e in EVIL]), geometry=gpd.points_from_xy(np.arange(7)/100+15, np.full(7,45.)), crs=4326)
    page = explore_map(g, credit=EVIL[0]).get_root().render()
    assert not any(e in page for e in EVIL[:3]) and '<b>bold' not in page and '49' not in page.split('7*7')[0][-3:]
    assert '&lt;script&gt;alert(1)' in page or '\\u0026lt;script' in page
    t = pd.DataFrame({'Feature':[f'{CELLS[0]}00000_A.jpg'], EVIL[0]:[1], EVIL[1]:[0]})
    page = explore_map(t).get_root().render()+explore_map(t, EVIL[0]).get_root().render()
    assert not any(e in page for e in EVIL[:3])

def test_moving_maps(town):
    d, _, labels = town
    page = explore_map(labels, 'forest', limit=2000).get_root().render()
    assert 'forest present' in page and OSM_CREDIT in page and 'tile.openstreetmap' not in page
    from imagesim.ard import tile_table
    assert d.acquisitions[0].catalog_id in explore_map(tile_table(d.ard)).get_root().render()
    with pytest.raises(InputError, match='too many for a browser'): explore_map(labels, limit=10)
    with pytest.raises(InputError, match='no place in Z33-0'): explore_map(labels, where='Z33-033333333333')


# ------------------------------------------------------------------------------------------------------------------ offset
@settings(max_examples=15, deadline=None)
@given(st.integers(-18,18), st.integers(-18,18), st.integers(0,5))
def test_a_moved_pattern_is_found(dx, dy, seed):
    from scipy import ndimage
    a = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(200,200)), 3)>0
    b = np.roll(a, (-dy,dx), (0,1))
    p = find_peak(shift_surface(edge_field(a[40:160,40:160]), edge_field(b[20:180,20:180]), 20), 1.)
    assert p.note=='ok' and math.hypot(p.dx-dx, p.dy-dy)<.5

@pytest.mark.parametrize('n', [1, 3, 5])
def test_a_search_too_small_to_judge_is_not_clear(n):
    s = np.ones((n,n)); s[n//2,n//2] = 9
    assert find_peak(s, .6).note!='ok'

def test_noise_has_no_clear_peak():
    rng = np.random.default_rng(0)
    notes = [find_peak(shift_surface(edge_field(rng.normal(size=(120,120)), 1.2), edge_field(rng.normal(size=(160,160)), 1.2), 20), 1.).note for _ in range(40)]
    assert notes.count('ok')<=3

@pytest.fixture(scope='module')
def banepa(shared):
    "The real buildings of Banepa, as features"
    import osmium
    rows, wkb = [], osmium.geom.WKBFactory()
    class Areas(osmium.SimpleHandler):
        def area(self, a):
            if 'building' in a.tags: rows.append((f'w{a.orig_id()}', dict(a.tags), wkb.create_multipolygon(a)))
    Areas().apply_file(str(shared/'banepa/banepa.osm.pbf'), locations=True)
    ids, tags, shapes = zip(*rows)
    g = gpd.GeoDataFrame(dict(element=ids, kind='area', tags=list(tags)), geometry=shapely.from_wkb(shapes), crs=4326).to_crs(32645)
    return find_tiles(shared/'banepa/ard')[0], g

def test_known_shifts_of_real_buildings_are_recovered(banepa):
    tile, g = banepa
    home = estimate_offset(tile, g)
    assert home.peak.note=='ok' and home.metres<1, 'they are aligned within a metre'
    for dx,dy in ((4,-3), (-9.3,6.1), (12,12.5)):
        o = estimate_offset(tile, g.set_geometry(g.translate(dx,dy)))
        assert math.hypot(o.dx+dx, o.dy+dy)<1 and o.peak.ratio>2 and o.kinds['building'].note=='ok'
        ok = o.blocks[o.blocks.note=='ok']
        assert len(ok)>=4 and (np.hypot(ok.dx+dx, ok.dy+dy)<1).all(), 'every block by itself'
    far = estimate_offset(tile, g.set_geometry(g.translate(70,-40)))
    assert far.peak.note!='ok' and math.isnan(far.dx)

def test_offset_of_painted_acquisitions(town):
    d, _, _ = town
    t = offset_table(d.ard, proc=1).set_index('tile')
    for a in d.acquisitions:
        row = t.loc[f'{d.cells[0].id}_{a.catalog_id}']
        true = -a.shift[1]*.30517578125, a.shift[0]*.30517578125
        if not math.isnan(row.road_dx): assert math.hypot(row.road_dx-true[0], row.road_dy-true[1])<1, 'roads lie on the ground'
        away = -math.sin(math.radians(a.view_azimuth)), -math.cos(math.radians(a.view_azimuth))
        if not math.isnan(row.building_dx): assert (row.building_dx-true[0])*away[0]+(row.building_dy-true[1])*away[1]>0, 'roofs lean away from the satellite'
    assert t[['road_dx','building_dx']].notna().any().all() and not t.attrs['problems']

def test_offset_says_when_it_cannot_tell(town, tmp_path):
    d, _, _ = town
    tile = find_tiles(d.ard)[0]
    g = read_osm(osm_path(d.ard, tile.cell))
    o = estimate_offset(tile, g[g.kind=='point'])
    assert o.peak.note=='not enough edges' and 'not enough edges' in repr(o) and visualize_offset(o)
    for reach in (0, -1, math.nan, 1e6): pytest.raises(InputError, estimate_offset, tile, g, reach_m=reach).match('3 to 200 m')
    with pytest.raises(MissingError, match='no OpenStreetMap data'): estimate_offset(tile, tmp_path)
    fig = visualize_offset(estimate_offset(tile, d.ard))
    assert any(OSM_CREDIT in t for t in texts(fig)) and fig.axes[1].get_xlabel()=='the map must move east by (m)'
