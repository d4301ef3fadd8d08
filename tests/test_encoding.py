"""Encodings: from sparse to dense and back without loss, in memory and in files"""
import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from imagesim.encoding import open_duck, read_labels_table, sql_files, sql_name, sql_text, to_dense, to_sparse
from imagesim.infra import CorruptError, InputError, MissingError

quick = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], derandomize=True)

names = st.lists(st.text(st.characters(blacklist_categories=('Cc','Cs'), blacklist_characters='\x85\u2028\u2029'), min_size=1, max_size=8).map(str.strip).filter(
    lambda s: s and s.lower() not in ('feature','present','unmapped')), min_size=1, max_size=5, unique_by=str.lower)

@st.composite
def tables(draw):
    "Sparse tables with odd class names"
    classes, rows = draw(names), draw(st.integers(0, 6))
    cols = {c:pd.array(draw(st.lists(st.sampled_from([0,1,None]), min_size=rows, max_size=rows)), dtype='Int8') for c in classes}
    return pd.DataFrame({'Feature':pd.Series([f'Z33-{i:017o}_X.jpg' for i in range(rows)], dtype=object), **cols})

def same(a, b): pd.testing.assert_frame_equal(a.astype({c:'Int8' for c in a.columns[1:]}), b, check_dtype=False, check_column_type=False)

@settings(max_examples=60, **quick)
@given(tables())
def test_frames_convert_without_loss(t): same(t, to_sparse(to_dense(t)))

@settings(max_examples=12, **quick)
@given(t=tables(), kind=st.sampled_from(['csv','parquet']), via=st.sampled_from(['csv','parquet']))
def test_files_convert_without_loss(tmp_path, t, kind, via):
    t.to_csv(tmp_path/'t.csv', index=False) if kind=='csv' else t.to_parquet(tmp_path/'t.parquet')
    to_dense(tmp_path/f't.{kind}', tmp_path/f'd.{via}')
    to_sparse(tmp_path/f'd.{via}', tmp_path/'back.csv', classes=list(t.columns[1:]))
    to_sparse(tmp_path/f'd.{via}', tmp_path/'back.parquet', classes=list(t.columns[1:]))
    for f in ('back.csv','back.parquet'): same(t, read_labels_table(tmp_path/f))
    d = read_labels_table(tmp_path/f'd.{via}', classes=list(t.columns[1:]))
    assert d.present.tolist()==to_dense(t).present.tolist() and d.unmapped.tolist()==to_dense(t).unmapped.tolist()

def test_tables_that_are_none(tmp_path):
    d = pd.DataFrame(dict(Feature=['a.jpg'], present=[['roads']], unmapped=[[]]))
    d.to_json(tmp_path/'x.json')
    with pytest.raises(InputError, match="'roads', which is unknown; did you mean 'road'"): to_sparse(d, classes=['road','water'])
    pq.write_table(pa.Table.from_pandas(d, preserve_index=False), tmp_path/'d.parquet')
    with pytest.raises(InputError, match="'roads', which is unknown; did you mean 'road'"): to_sparse(tmp_path/'d.parquet', tmp_path/'s.csv', classes=['road','water'])
    assert not (tmp_path/'s.csv').exists()
    with pytest.raises(InputError, match='twice'): to_sparse(d.assign(unmapped=[['roads']]), classes=['roads'])
    (tmp_path/'s.csv').write_text('Feature,roads\na.jpg,7\n')
    with pytest.raises(InputError, match="class 'roads' of 'a.jpg' is '7'"): to_dense(tmp_path/'s.csv', tmp_path/'d.csv')
    (tmp_path/'n.csv').write_text('name,roads\na.jpg,1\n')
    with pytest.raises(InputError, match='not a table of labels'): to_dense(tmp_path/'n.csv', tmp_path/'d.csv')
    (tmp_path/'p.parquet').write_bytes(b'PAR1 no')
    with pytest.raises(CorruptError, match='not a Parquet file'): to_dense(tmp_path/'p.parquet', tmp_path/'d.csv')
    with pytest.raises(MissingError): to_dense(tmp_path/'q.parquet', tmp_path/'d.csv')

@settings(max_examples=60, **quick)
@given(st.text(st.characters(blacklist_categories=('Cs',), blacklist_characters='\x00'), min_size=1, max_size=12))
def test_any_text_stands_in_sql(s):
    with open_duck() as con:
        d = con.execute(f'SELECT {sql_text(s)} AS {sql_name("c"+s)}')
        row, name = d.fetchone()[0], d.description[0][0]
    assert row==s and name=='c'+s

@pytest.mark.parametrize('name', ["it's.csv", 'a[1].csv', 'b*.csv', 'c?.csv', 'ü, d.csv'])
def test_a_file_name_is_no_pattern(tmp_path, name):
    for n in (name, 'a1.csv', 'bx.csv', 'cx.csv'): (tmp_path/n).write_text(f'x\n{n.replace(",","")}\n')
    with open_duck() as con: assert con.execute(f'SELECT x FROM read_csv({sql_files([tmp_path/name])}, header=true, delim=\';\')').fetchall()==[(name.replace(',',''),)]

def test_a_connection_leaves_nothing(tmp_path):
    with open_duck(where=str(tmp_path)) as con:
        con.execute('CREATE TABLE t AS SELECT * FROM range(100_000)')
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), open_duck(where=str(tmp_path)): 1/0
    assert not list(tmp_path.iterdir())

def test_names_that_head_columns_elsewhere():
    for c in ('chips','Places','blocks','empty','date','key','rows'):
        with pytest.raises(InputError, match='rename it in the schema'): to_dense(pd.DataFrame({'Feature':['a.jpg'], c:[1]}))

def test_csv_of_other_programs(tmp_path):
    "A mark at the beginning does no harm, another encoding is named"
    (tmp_path/'bom.csv').write_bytes('\ufeffFeature,wäter\na.jpg,1\n'.encode())
    assert read_labels_table(tmp_path/'bom.csv').to_dict('list')=={'Feature':['a.jpg'], 'wäter':[1]}
    (tmp_path/'latin.csv').write_bytes('Feature,wäter\na.jpg,1\n'.encode('latin-1'))
    with pytest.raises(InputError, match='UTF-8'): read_labels_table(tmp_path/'latin.csv')

@pytest.mark.parametrize('rows,what', [(['a.jpg,1',',0'], 'the name of its chip'), (['a.jpg,1','a.jpg,0'], 'there twice'), (['a.jpg,1','a.jpg,'], 'there twice')])
def test_rows_that_can_not_be(tmp_path, rows, what):
    (tmp_path/'t.csv').write_text('\n'.join(['Feature,water',*rows])+'\n')
    with pytest.raises(InputError, match=what): read_labels_table(tmp_path/'t.csv')
    t = pd.read_csv(tmp_path/'t.csv').astype({'water':'Int8'})
    with pytest.raises(InputError, match=what): to_dense(t)
    (tmp_path/'same.csv').write_text('Feature,water\na.jpg,1\na.jpg,1.0\n')
    assert len(read_labels_table(tmp_path/'same.csv'))==2

def test_parquet_of_other_programs(tmp_path):
    pq.write_table(pa.table(dict(Feature=['a.jpg','b.jpg'], water=pa.array([1., float('nan')]))), tmp_path/'nan.parquet')
    assert read_labels_table(tmp_path/'nan.parquet').water.isna().tolist()==[False,True]
    pq.write_table(pa.table(dict(Feature=['a.jpg'], present=['water'], unmapped=[''])), tmp_path/'text.parquet')
    with pytest.raises(CorruptError, match='can not be read'): read_labels_table(tmp_path/'text.parquet', classes=['water'])
    with pytest.raises(InputError, match='holds lists'): to_sparse(pd.DataFrame(dict(Feature=['a.jpg'], present=['water'], unmapped=[''])), classes=['water'])
    for note in ('{', '[1]'):
        pq.write_table(pa.table(dict(Feature=['a.jpg'], present=[['water']], unmapped=[[]])).replace_schema_metadata({'imagesim':note}), tmp_path/'note.parquet')
        with pytest.raises(InputError, match='pass classes='): read_labels_table(tmp_path/'note.parquet')

@pytest.mark.parametrize('folder', ['qu?', 'b\\s', 'st*r[1]'])
def test_folders_with_odd_names(tmp_path, folder):
    (tmp_path/folder).mkdir()
    (tmp_path/folder/'t.csv').write_text('Feature,water\na.jpg,1\n')
    to_dense(tmp_path/folder/'t.csv', tmp_path/folder/'d.parquet')
    assert read_labels_table(tmp_path/folder/'d.parquet').present.tolist()==[['water']]
    with open_duck(where=str(tmp_path/folder)) as con: con.execute('CREATE TABLE t AS SELECT range AS a FROM range(100_000)')
