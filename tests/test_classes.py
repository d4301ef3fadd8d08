"""Class schemas: filters against a plain reading of them, files with mistakes, what the shipped schemas make of real extracts"""
import itertools, random, re

import geopandas as gpd, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from shapely import LineString, Point, box

from imagesim.classes import Filter, SchemaError, TagIndex, TagTest, _Places, parse_schema, read_schema, schema_names
from imagesim.infra import ImagesimError, InputError, MissingError

HEAD = 'name = "t"\n'
def one(body): return f'{HEAD}[[class]]\nname = "a"\npresent = 0.2\n{body}\n'

def table(*rows, crs=32633):
    return gpd.GeoDataFrame(dict(element=[f'w{i}' for i in range(len(rows))], kind=[r[0] for r in rows], tags=[r[1] for r in rows]), geometry=[r[2] for r in rows], crs=crs)

SHAPES = dict(area=lambda s: box(0,0,s,s), line=lambda s: LineString([(0,0),(s,0)]), point=lambda s: Point(s,s))
KEYS, VALUES = 'abc', ['yes','no','x','x;y','y','4','7.5','12 m']
tests = st.one_of(
    st.builds(lambda k,v: TagTest(k, values=frozenset(v)), st.sampled_from(KEYS), st.sets(st.sampled_from(['yes','no','x','y']), min_size=1)),
    st.builds(lambda k,v: TagTest(k, there=v), st.sampled_from(KEYS), st.booleans()),
    st.builds(lambda k,p: TagTest(k, patterns=(p,)), st.sampled_from(KEYS), st.sampled_from(['*','x*','?','~[0-9]+'])),
    st.builds(lambda k,lo: TagTest(k, least=lo), st.sampled_from(KEYS), st.sampled_from([0.,4.,8.])))
leaves = st.builds(Filter, tags=st.lists(tests, max_size=2).map(tuple), geometry=st.sampled_from([(),('area',),('line','point')]), area_m2=st.sampled_from([None,(4.,None),(None,50.)]))
filters = st.recursive(leaves, lambda f: st.builds(Filter, tags=st.lists(tests, max_size=1).map(tuple), all=st.lists(f, max_size=2).map(tuple), any=st.lists(f, max_size=2).map(tuple), none=st.lists(f, max_size=2).map(tuple)), max_leaves=5)
rows = st.lists(st.tuples(st.sampled_from(list(SHAPES)), st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES)), st.sampled_from([1.,3.,9.])), min_size=1, max_size=6)

def meets(f, kind, tags, shape):
    "a filter, read word by word"
    if f.geometry and kind not in f.geometry: return False
    if f.area_m2 and not (kind=='area' and (f.area_m2[0] or 0)<=shape.area<=(f.area_m2[1] or 1e9)): return False
    return (all(t.accepts(tags.get(t.key)) for t in f.tags) and all(meets(g,kind,tags,shape) for g in f.all) and
            (not f.any or any(meets(g,kind,tags,shape) for g in f.any)) and not any(meets(g,kind,tags,shape) for g in f.none))

@settings(max_examples=150, deadline=None)
@given(filters, rows)
def test_filters_on_arrays_agree_with_filters_on_one_feature(f, features):
    gdf = table(*[(k,t,SHAPES[k](s)) for k,t,s in features])
    got = f.where(TagIndex(gdf, f.keys()))
    assert got.tolist()==[meets(f,*r) for r in zip(gdf.kind, gdf.tags, gdf.geometry)]

@settings(max_examples=60, deadline=None)
@given(filters, rows)
def test_a_step_more_never_finds_more(f, features):
    ix = TagIndex(table(*[(k,t,SHAPES[k](s)) for k,t,s in features]), f.keys())
    found = [f.where(ix, step) for step in range(4)]
    for a,b in itertools.pairwise(found): assert not (b&~a).any()

MISTAKES = [
    ('tags = { landuse = "forest" }\nmesure = "share"', 6, "did you mean 'measure'?"),
    ('tags = { landuse = 3 }', 5, 'write it in quotes ("3")'),
    ('tags = { landuse = [] }', 5, 'can never match'),
    ('tags = { "building:levels" = { min = 5, max = 2 } }', 5, 'min 5 is above max 2'),
    ('tags = { "building:levels" = { least = 5 } }', 5, "no key 'least'"),
    ('tags = { ref = "~[" }', 5, 'not a regular expression'),
    ('tags = "forest"', 5, 'a table such as'),
    ('tags = { a = "b" }\ncolour = "red"', 6, '#1e7a3c'),
    ('tags = { a = "b" }\nkind = "grund"', 6, "did you mean 'ground'?"),
    ('tags = { a = "b" }\nmeasure = "meters"', 6, "did you mean 'metres'?"),
    ('tags = { a = "b" }\ngeometry = ["polygon"]', 6, 'a list of "area", "line" and "point"'),
    ('tags = { a = "b" }\ngeometry = ["line"]', 6, 'a share is measured of area'),
    ('tags = { a = "b" }\narea_m2 = [450, 35]', 6, '450 is more than 35'),
    ('tags = { a = "b" }\narea_m2 = 35', 6, 'write [least, most]'),
    ('tags = { a = "b" }\nlength_m = [5, 10]', 3, 'can never match'),
    ('tags = { a = "b" }\nnone = [{ tags = { a = true } }]', 3, 'ruled out by none'),
    ('tags = { a = ["b","c"] }\nnone = [{ tags = { a = ["b","c","d"] } }]', 3, 'ruled out by none'),
    ('any = ["wood"]', 5, 'there is no such section'),
    ('any = []', 5, 'its list is empty'),
    ('all = { tags = { a = "b" } }', 5, 'a list of filters'),
    ('none = [{ tags = { a = "b" } }]', 3, 'names no tags'),
    ('tags = { a = "b" }\nnone = [{}]', 6, 'empty filter'),
    ('tags = { a = "b" }\nwithin = { tag = { a = "b" } }', 6, "did you mean 'tags'?"),
    ('tags = { a = "b" }\ntitle = 3', 6, 'it must be a text')]

@pytest.mark.parametrize('body,line,says', MISTAKES, ids=[m[2] for m in MISTAKES])
def test_mistakes_are_named_with_their_line_and_the_fix(body, line, says):
    with pytest.raises(SchemaError) as e: parse_schema(one(body), 'mine.toml')
    told = [t for t in str(e.value).splitlines() if says in t]
    assert told, str(e.value)
    # a mistake of the class as a whole is told at the head of the class
    assert any(re.search(rf'line {n}:', t) for t in told for n in ({line} if line!=3 else {2,3})), str(e.value)

@pytest.mark.parametrize('present,ok', [(0.2,True), (1,True), (0,False), (-1,False), (20,False), ('true',False), ('"0.2"',False)])
def test_thresholds_are_in_range(present, ok):
    text = f'{HEAD}[[class]]\nname = "a"\npresent = {present}\ntags = {{ a = "b" }}\n'
    if ok: assert parse_schema(text).classes[0].present==present
    else: pytest.raises(SchemaError, parse_schema, text).match('present')

@pytest.mark.parametrize('name', ['Forest', '2nd', 'a b', 'place', 'lon', 'a_state', 'a_newest', '', "a'b"])
def test_names_that_can_not_head_a_column(name):
    with pytest.raises(SchemaError, match='line 3.*(head a column|taken)'): parse_schema(f'{HEAD}[[class]]\nname = "{name}"\npresent = 1\ntags = {{ a = "b" }}\n')

def test_filters_may_not_ask_for_themselves():
    text = HEAD+'[filters.a]\nany = ["b"]\n[filters.b]\nany = ["a"]\n[[class]]\nname = "x"\npresent = 0.1\nany = ["a"]\n'
    with pytest.raises(SchemaError, match='asks for itself: .*a > b > a'): parse_schema(text)

def test_what_is_not_toml_is_told_with_its_line():
    with pytest.raises(SchemaError, match='line 3'): parse_schema('name = "a"\n\nversion = oops\n')

def test_lines_are_found_whatever_the_layout():
    text = "a = 'x' # [b]\nb.c = [1, # one\n  [2, \"]\"],\n  { d = { e = '''\n}''' }, f = 1 }]\n[[t]]\n[t.u]\n\"v w\" = 1\n[[t]]\nk = 2\n"
    at = _Places(text).lines
    assert (at['b','c',1,1], at['b','c',2,'d','e'], at['b','c',2,'f'], at['t',0,'u','v w'], at['t',1,'k'])==(3, 4, 5, 8, 10)

def test_the_hash_knows_meaning_and_not_layout():
    text = read_schema('land13').text
    bare = re.sub(r'\n\n+', '\n', re.sub(r'(?m)^\s*#.*\n', '', text)).replace('colour = "#1e7a3c"', 'colour = "#000000"').replace('title = "Forest"', 'title = "Trees"')
    assert bare!=text and parse_schema(bare).hash==read_schema('land13').hash
    for a,b in (('present = 0.20','present = 0.21'), ('"orchard", "vineyard", "plant_nursery"] }\nexcluded','"orchard", "vineyard"] }\nexcluded'), ('kind = "sports"','kind = "ground"')):
        assert a in text and parse_schema(text.replace(a,b,1)).hash!=read_schema('land13').hash

def test_read_schema_from_disk_bucket_and_by_name(tmp_path, bucket):
    from imagesim.infra import write_bytes
    text = read_schema('buildings').text
    (tmp_path/'b.toml').write_text(text)
    write_bytes(f'{bucket}/b.toml', text.encode())
    assert read_schema(tmp_path/'b.toml').hash==read_schema(f'{bucket}/b.toml').hash==read_schema('buildings').hash
    with pytest.raises(MissingError): read_schema(tmp_path/'c.toml')
    with pytest.raises(InputError, match="did you mean 'rare'"): read_schema('rar')
    (tmp_path/'latin.toml').write_bytes('name = "ä"'.encode('latin-1'))
    with pytest.raises(SchemaError, match='UTF-8'): read_schema(tmp_path/'latin.toml')

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_a_damaged_schema_never_ends_in_a_traceback(seed):
    r, text = random.Random(seed), read_schema('rare').text
    for _ in range(r.randint(1,3)):
        i = r.randrange(len(text))
        text = text[:i]+r.choice(['', '"', '[', '}', '3', '\n', '= '])+text[i+r.randint(0,6):]
    try: parse_schema(text)
    except ImagesimError: pass

@pytest.mark.parametrize('name', schema_names())
def test_shipped_schemas_are_complete(name):
    s = read_schema(name)
    assert len({c.colour for c in s})==len(s) and all(c.title and c.rule.words() for c in s)
    html = s._repr_html_()
    assert all(c.title in html for c in s) and html.count('<tr>')==len(s)+1

def test_land13_by_sizes_levels_and_tunnels():
    s = read_schema('land13')
    def classes(kind, size, **tags):
        ix = table((kind, {k.replace('__',':'):v for k,v in tags.items()}, SHAPES[kind](size)))
        return {n for n,h in zip(s.names, s.match(ix)[0]) if h}
    assert classes('area', 10, building='yes')=={'houses'}
    assert classes('area', 5, building='yes')==set()
    assert classes('area', 30, building='yes')=={'apartments'}
    assert classes('area', 10, building='yes', building__levels='6')=={'apartments'}
    assert classes('area', 40, building='yes')=={'industry_retail'}
    assert classes('area', 40, building='apartments')=={'apartments'}
    assert classes('area', 20, building='yes', layer='-1')==set()
    assert classes('line', 100, highway='primary')=={'major_road'}
    assert classes('line', 100, highway='primary', tunnel='yes')==set()
    assert classes('area', 100, highway='primary')==set()
    assert classes('line', 100, railway='rail', layer='-2')==set()
    assert classes('area', 40, amenity='parking', parking='multi-storey')==set()
    assert classes('point', 1, amenity='parking')==set()
    assert classes('area', 40, natural='water', water='sea')=={'water'}

@pytest.mark.parametrize('pattern', ['***********b', '*a*a*a*a*a*a*a*a*b', '~(a|a)*b', '~(a+)+$b'])
def test_no_pattern_takes_for_ever(pattern):
    "each of these would run for years if it tried all ways to fit"
    assert not TagTest('a', patterns=(pattern,)).accepts('a'*255)
    assert parse_schema(one(f'tags = {{ a = "{pattern}" }}'))

def test_patterns_are_whole_and_see_line_breaks():
    fits = lambda p, v: TagTest('a', patterns=(p,)).accepts(v)
    assert fits('a*', 'a\nb') and fits('*[é].b?', 'x[é].bñ') and not fits('*[é].b?', 'x[é].b') and not fits('a?', 'a') and fits('~A[0-9]+|B', 'x; A12') and not fits('~A[0-9]+|B', 'A1x')
    assert not fits('~a$', 'a\n')

@pytest.mark.parametrize('pattern', ['~a(?=b)', '~(a)\\\\1', '~a)|(b', '~(a{1000}){1000}', '*'.join('a'*2_000_000)])
def test_what_re2_does_not_read_is_a_mistake(pattern):
    with pytest.raises(SchemaError, match='line 5: a: .*(not a regular expression|too long)'): parse_schema(one(f'tags = {{ a = "{pattern}" }}'))

def test_one_long_value_takes_little_memory():
    import tracemalloc
    rows = table(*[('area', {'name':f'v{i}'}, SHAPES['area'](1.)) for i in range(2000)], ('area', {'name':'x'*100_000}, SHAPES['area'](1.)))
    tracemalloc.start()
    ix = TagIndex(rows, ['name'])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak<50e6 and ix.test(TagTest('name', patterns=('x*',))).tolist()==[False]*2000+[True]

DEEP = {'doubling': '[filters]\n'+''.join(f'f{i} = {{ any = ["f{i+1}","f{i+1}"] }}\n' for i in range(22))+'f22 = { tags = { a = "b" } }\n',
        'chain': '[filters]\n'+''.join(f'f{i} = "f{i+1}"\n' for i in range(1200))+'f1200 = { tags = { a = "b" } }\n'}

@pytest.mark.parametrize('kind', DEEP)
def test_filters_that_name_filters_have_an_end(kind):
    with pytest.raises(SchemaError, match='over 50 deep|2,000 are the most'): parse_schema(f'{HEAD}{DEEP[kind]}[[class]]\nname = "a"\npresent = 0.2\nany = ["f0"]\n')

@pytest.mark.parametrize('depth', [60, 200, 1500])
def test_nested_filters_have_an_end(depth):
    with pytest.raises(SchemaError, match='deep'): parse_schema(one('any = '+'[{ none = '*depth+'[{ tags = { a = "b" } }]'+' }]'*depth))

@pytest.mark.parametrize('number', ['nan', 'inf', '1'+'0'*400, '1'+'0'*5000], ids=['nan','inf','400 digits','5000 digits'])
@pytest.mark.parametrize('body', ['tags = {{ a = {{ min = {} }} }}', 'tags = {{ a = "b" }}\narea_m2 = [1, {}]', 'tags = {{ a = "b" }}\narea_m2 = {{ min = {} }}', 'present = {}\ntags = {{ a = "b" }}'])
def test_numbers_are_numbers(number, body):
    body = body.format(number)
    text = one(body) if 'present' not in body else f'{HEAD}[[class]]\nname = "a"\n{body}\n'
    with pytest.raises(SchemaError) as e: parse_schema(text)
    assert len(str(e.value))<400

@pytest.mark.parametrize('name', 'date key rows chips places blocks empty total source labels'.split())
def test_names_of_our_own_columns_are_taken(name):
    with pytest.raises(SchemaError, match='line 3.*taken'): parse_schema(f'{HEAD}[[class]]\nname = "{name}"\npresent = 1\ntags = {{ a = "b" }}\n')

def test_a_byte_order_mark_is_no_part_of_a_schema(): assert parse_schema('\ufeff'+read_schema('rare').text).hash==read_schema('rare').hash
