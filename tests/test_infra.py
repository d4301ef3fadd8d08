"""Storage, sync and work under conditions that a notebook should not have to show."""
import os, shutil, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from imagesim.infra import (CorruptError, FileInfo, InputError, MissingError, SettingsError, Skip, StorageError, atomic_path, exists, file_info, fingerprint,
                            get_settings, init_layout, is_dir, list_dirs, list_files, map_items, merge_ranges, one_line, read_bytes, read_ranges,
                            relative_path, safe_relative, sync, write_bytes, write_json)
from conftest import ROOT

# -- worker functions live in a module, as everywhere

def double(n): return 2*n
def hear_interrupts(): signal.signal(signal.SIGINT, signal.SIG_DFL) # a shell's background jobs, and what they start, ignore them
def pid_after(path): Path(path).with_suffix('.pid').write_text(str(os.getpid())); time.sleep(60)
def die(n): os._exit(9) if n==3 else None; return n
def unpicklable(n): return (lambda: n) if n==1 else n
class OddError(Exception):
    def __init__(self, a, b): super().__init__(f'{a} and {b}') # such errors do not survive pickling
def odd(n): raise OddError(1, 2)

# -- ranges

@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 100)), max_size=30), st.integers(0, 200))
def test_merged_ranges_cover_exactly_what_was_asked(ranges, gap):
    merged = merge_ranges(ranges, gap)
    assert sorted(i for *_,members in merged for i in members)==list(range(len(ranges)))
    for start,end,members in merged:
        assert start==min(ranges[i][0] for i in members) and end==max(sum(ranges[i]) for i in members)
    for (_,end,_),(start,*_) in zip(merged, merged[1:]): assert start-end>gap

@given(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 100)), max_size=30), st.integers(0, 200))
def test_ranges_read_the_right_bytes(tmp_path_factory, ranges, gap):
    data = bytes(i%251 for i in range(1000))
    f = tmp_path_factory.getbasetemp()/'ranges.bin'
    f.write_bytes(data)
    assert read_ranges(f, ranges, gap)==[data[o:o+n] for o,n in ranges]

# -- S3

def test_s3_speaks_the_same_verbs(bucket):
    write_json(f'{bucket}/ard/33/a.json', dict(a=1))
    write_bytes(f'{bucket}/ard/33/0313/b.bin', bytes(range(200)))
    write_bytes(f'{bucket}/ard/33/.hidden', b'')
    assert [relative_path(o.path, bucket) for o in list_files(bucket)]==['ard/33/0313/b.bin', 'ard/33/a.json']
    assert list_dirs(f'{bucket}/ard')==['33'] and is_dir(f'{bucket}/ard') and exists(f'{bucket}/ard/33/a.json') and not exists(f'{bucket}/ard/34')
    assert file_info(f'{bucket}/ard/33/0313/b.bin').size==200 and len(file_info(f'{bucket}/ard/33/a.json').etag)==32
    assert read_ranges(f'{bucket}/ard/33/0313/b.bin', [(190,5), (3,2), (100,0)], gap=10)==[bytes(range(190,195)), bytes([3,4]), b'']
    with pytest.raises(CorruptError, match='cut off'): read_ranges(f'{bucket}/ard/33/0313/b.bin', [(190,50)])
    with pytest.raises(MissingError, match='nothing there'): list_files(f'{bucket}/none')

def test_s3_objects_appear_whole(bucket):
    with pytest.raises(RuntimeError), atomic_path(f'{bucket}/x.parquet') as tmp:
        Path(tmp).write_bytes(b'half')
        raise RuntimeError
    assert not exists(f'{bucket}/x.parquet') and not Path(tmp).parent.exists()
    with atomic_path(f'{bucket}/x.parquet') as tmp: Path(tmp).write_bytes(b'whole')
    assert read_bytes(f'{bucket}/x.parquet')==b'whole'

def serve_status(status, body=b''):
    "An S3 endpoint that answers everything alike"
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status); self.send_header('Content-Length', str(len(body))); self.send_header('Content-Type', 'application/xml'); self.end_headers()
            if self.command=='GET': self.wfile.write(body)
        do_HEAD = do_GET
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f'http://127.0.0.1:{server.server_port}'

def test_bucket_that_is_closed_to_us(monkeypatch, imagesim):
    denied = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
    server, url = serve_status(403, denied)
    try:
        monkeypatch.setenv('AWS_ENDPOINT_URL', url)
        with pytest.raises(StorageError, match='IMAGESIM_S3_ANONYMOUS'): list_files('s3://imagesim-storage/ard')
        p = imagesim('sync', 's3://imagesim-storage/ard', 'ard')
        assert p.returncode==2 and len(p.stderr.strip().splitlines())==1 and 'not allowed' in p.stderr
    finally: server.shutdown()

def test_bucket_that_nobody_answers_for(imagesim):
    p = imagesim('sync', 's3://imagesim-storage/ard', 'ard', env=dict(AWS_ENDPOINT_URL='http://127.0.0.1:9'))
    assert p.returncode==2 and len(p.stderr.strip().splitlines())==1 and 's3://imagesim-storage/ard' in p.stderr

def test_no_credentials(imagesim, s3_server):
    p = imagesim('sync', 's3://imagesim-storage/ard', 'ard', env=dict(AWS_ENDPOINT_URL=s3_server, AWS_ACCESS_KEY_ID='', AWS_SECRET_ACCESS_KEY=''))
    assert p.returncode==2 and 'aws configure' in p.stderr and len(p.stderr.strip().splitlines())==1

# -- sync

def test_sync_copies_what_is_missing_and_no_more(bucket, tmp_path):
    src = tmp_path/'src'
    for i in range(5): write_bytes(src/f'33/{i}/x-visual.tif', bytes([i])*(i*1000+1))
    write_bytes(src/'33/0/x.json', b'{}')
    up = sync(src, bucket)
    assert (up.done, up.skipped, up.exit_code)==(6, 0, 0)
    down = sync(bucket, tmp_path/'dest', only='visual')
    assert down.done==5 and not (tmp_path/'dest/33/0/x.json').exists()
    assert sync(bucket, tmp_path/'dest', only=['visual']).skipped==5
    (tmp_path/'dest/33/3/x-visual.tif').write_bytes(b'short')
    again = sync(bucket, tmp_path/'dest')
    assert (again.done, again.skipped)==(2, 4)
    assert (tmp_path/'dest/33/3/x-visual.tif').read_bytes()==(src/'33/3/x-visual.tif').read_bytes()

def test_sync_notices_a_reorder_of_equal_size(bucket, tmp_path):
    write_bytes(f'{bucket}/a-visual.tif', b'old pixels')
    sync(bucket, tmp_path/'d')
    stamp = file_info(f'{bucket}/a-visual.tif').modified
    assert abs(os.stat(tmp_path/'d/a-visual.tif').st_mtime-stamp)<1
    os.utime(tmp_path/'d/a-visual.tif', (stamp-100, stamp-100)) # ours is now the older one
    write_bytes(f'{bucket}/a-visual.tif', b'new pixels')
    assert sync(bucket, tmp_path/'d').done==1 and (tmp_path/'d/a-visual.tif').read_bytes()==b'new pixels'

def test_sync_refuses_names_that_leave_the_folder(bucket, tmp_path):
    import boto3
    client = boto3.client('s3', endpoint_url=os.environ['AWS_ENDPOINT_URL'])
    client.put_object(Bucket=bucket[5:], Key='in/../../evil.json', Body=b'x')
    client.put_object(Bucket=bucket[5:], Key='in/good.json', Body=b'y')
    s = sync(f'{bucket}/in', tmp_path/'deep/er')
    assert s.done==1 and s.failed==1 and 'not a safe name' in s.failures[0][1] and s.exit_code==1
    assert sorted(p.name for p in tmp_path.rglob('*.json'))==['good.json']

@pytest.mark.parametrize('sig,code', [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_stopped_sync_resumes_inside_a_file(bucket, tmp_path, sig, code):
    big = os.urandom(96*2**20)
    write_bytes(f'{bucket}/ard/a-visual.tif', big)
    write_bytes(f'{bucket}/ard/b-visual.tif', b'small')
    cmd = [sys.executable, '-m', 'imagesim.cli', 'sync', f'{bucket}/ard', str(tmp_path/'ard'), '--proc', '2']
    env, whole = dict(os.environ, PYTHONPATH=str(ROOT)), tmp_path/'ard/a-visual.tif'
    for _ in range(8): # on a quick disk the copy may end before the signal arrives: then once more, from the beginning
        p = subprocess.Popen(cmd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts)
        deadline, parts = time.time()+60, []
        while time.time()<deadline and p.poll() is None and not parts:
            parts = [f for f in (tmp_path/'ard').glob('.*a-visual.tif.part') if f.stat().st_size>=2**24] if (tmp_path/'ard').exists() else []
        p.send_signal(sig)
        said = p.communicate(timeout=30)[1]
        if not whole.exists(): break
        shutil.rmtree(tmp_path/'ard')
    assert p.returncode==code and 'Traceback' not in said and (sig==signal.SIGKILL or 'call it again to go on' in said)
    assert parts and not whole.exists(), 'the run was to be killed in the middle of the large file'
    with open(parts[0], 'r+b') as f: f.write(b'KEPT') # were it fetched anew, this mark would be gone
    assert subprocess.run(cmd, env=env, stdout=subprocess.DEVNULL).returncode==0
    got = (tmp_path/'ard/a-visual.tif').read_bytes()
    assert got[:4]==b'KEPT' and got[4:]==big[4:]
    assert [f.name for f in (tmp_path/'ard').iterdir() if f.name[0]=='.']==[]

def test_sync_names_its_mistakes(imagesim, tmp_path):
    (tmp_path/'src').mkdir()
    for args,words in {('src','dest'):'no file to copy', ('nowhere','dest'):'nothing there', ('src','src/in'):'into itself', ('src','dest','--only','visul'):"did you mean 'visual'",
                       ('src','ftp://x/y'):'only local paths and s3://', ('src','dest','--push'):'--push goes with one path', ('/abs',):'second path'}.items():
        p = imagesim('sync', *args)
        assert p.returncode==2 and words in p.stderr and len(p.stderr.strip().splitlines())==1, (args, p.stderr)

@pytest.mark.parametrize('name', ['../x', 'a/../x', '/x', 'a//b', './x', '', 'a\\b', 'a\0b', 'a/.'])
def test_unsafe_names(name):
    with pytest.raises(InputError): safe_relative(name)

# -- settings and layout

def test_settings_from_file_and_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'imagesim.toml').write_text('proc = 3\nbucket = "s3://other/"')
    assert (get_settings().proc, get_settings().bucket)==(3, 's3://other')
    monkeypatch.setenv('IMAGESIM_PROC', '5')
    assert get_settings().proc==5 and get_settings(proc=7).proc==7
    monkeypatch.setenv('IMAGESIM_CONTCAT', 'x')
    with pytest.raises(SettingsError, match="did you mean 'IMAGESIM_CONTACT'"): get_settings()

@pytest.mark.parametrize('env,words', [(dict(IMAGESIM_PROC='0'), 'IMAGESIM_PROC'), (dict(IMAGESIM_PROGRESS='maybe'), 'IMAGESIM_PROGRESS'),
                                       (dict(IMAGESIM_CONFIG='no.toml'), 'not a file'), (dict(IMAGESIM_BUKET='x'), "did you mean 'IMAGESIM_BUCKET'")])
def test_bad_settings_end_with_2_and_one_line(imagesim, env, words):
    p = imagesim('init', env=env)
    assert p.returncode==2 and words in p.stderr and len(p.stderr.strip().splitlines())==1

def test_layout_is_made_once_and_left_alone(tmp_path):
    init_layout(tmp_path/'data')
    assert sorted(p.name for p in (tmp_path/'data').iterdir())==['ard', 'chips', 'datasets', 'embeddings', 'models', 'notebooks', 'schemas']
    (tmp_path/'data/chips/x.jpg').write_bytes(b'x')
    init_layout(tmp_path/'data')
    assert (tmp_path/'data/chips/x.jpg').read_bytes()==b'x'
    with pytest.raises(InputError, match='is a file'): init_layout(tmp_path/'data/chips/x.jpg')

def test_writing_where_it_is_refused(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises((StorageError, InputError)): write_bytes(tmp_path/'file/x', b'')
    if os.path.exists('/dev/full'):
        with pytest.raises(OSError), atomic_path(tmp_path/'x') as tmp:
            os.symlink('/dev/full', tmp)
            with open(tmp, 'wb') as f: f.write(b'1'*100_000)
        assert sorted(p.name for p in tmp_path.iterdir())==['file']

def test_mode_of_what_is_written_follows_the_umask(tmp_path):
    old = os.umask(0o022)
    try: write_bytes(tmp_path/'x', b'')
    finally: os.umask(old)
    assert oct((tmp_path/'x').stat().st_mode & 0o777)=='0o644'

# -- fingerprints

def test_fingerprint_depends_on_content_not_on_place():
    a, b = (FileInfo(p, 10, 1.5, None) for p in ('/x/a.tif', 's3://y/a.tif'))
    assert fingerprint(a, 17)==fingerprint(b, 17)!=fingerprint(a, 18)
    assert fingerprint(FileInfo('a', 10, 1., 'e1'))==fingerprint(FileInfo('a', 10, 2., 'e1'))!=fingerprint(FileInfo('a', 10, 1., 'e2'))
    with pytest.raises(InputError, match='pass numbers, strings'): fingerprint(object())

# -- work

@pytest.mark.parametrize('kw', [dict(proc=1), dict(proc=2), dict(proc=3, threads=True)])
def test_map_items_keeps_order_and_reasons(kw):
    s = map_items(double, (x for x in [1, None, 3]), **kw)
    assert s.values==[2, 6] and s.failed==1 and s.exit_code==1 and s.failures[0][0]=='None' and 'TypeError' in s.failures[0][1]
    assert 'unsupported operand' in s.outcomes[1].trace

def test_killed_worker_is_one_failure():
    s = map_items(die, range(8), proc=2)
    assert s.values==[0,1,2,4,5,6,7] and s.failures[0][0]=='3' and 'died twice' in s.failures[0][1]

def test_results_and_errors_that_do_not_pickle_are_failures_not_hangs():
    s = map_items(unpicklable, [0, 1, 2], proc=2)
    assert s.values==[0, 2] and s.failed==1
    s = map_items(odd, [0, 0], proc=2)
    assert s.failed==2 and '1 and 2' in s.failures[0][1]

def test_items_are_taken_as_they_are_needed():
    taken = []
    def items():
        for i in range(1000): taken.append(i); yield i
    seen = []
    def look(i): seen.append(len(taken)-i)
    map_items(look, items(), proc=2, threads=True)
    assert max(seen)<=8 and len(taken)==1000

def test_dask_cluster_does_the_same():
    distributed = pytest.importorskip('distributed')
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        s = map_items(double, [1, 2, 'x', None], scheduler=cluster.scheduler_address)
    assert s.values==[2, 4, 'xx'] and s.failed==1

def test_no_scheduler_there():
    pytest.importorskip('distributed')
    with pytest.raises(InputError, match='no Dask scheduler answers'): map_items(double, [1], scheduler='tcp://127.0.0.1:9')

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split(')')[-1].split()[0]!='Z'
    except OSError: return False

@pytest.mark.skipif(not Path('/proc/self').exists(), reason='reads /proc')
@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(tmp_path, sig):
    code = 'import faulthandler; faulthandler.dump_traceback_later(25)\n' \
           f'import sys; sys.path[:0]=[{str(ROOT)!r},{str(ROOT/"tests")!r}]\nfrom imagesim.infra import map_items\nimport test_infra\n' \
           f'if __name__=="__main__": map_items(test_infra.pid_after, [{str(tmp_path/"a")!r},{str(tmp_path/"b")!r}], proc=2)'
    script = tmp_path/'script.py'
    script.write_text(code)
    with open(tmp_path/'said', 'w') as said:
        p = subprocess.Popen([sys.executable, script], stderr=said, preexec_fn=hear_interrupts, env=dict(os.environ, PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT/"tests"}'))
    deadline = time.time()+60
    while len(list(tmp_path.glob('*.pid')))<2 and time.time()<deadline: time.sleep(.05)
    pids = [int(f.read_text()) for f in tmp_path.glob('*.pid')]
    p.send_signal(sig)
    try: p.wait(timeout=30)
    except subprocess.TimeoutExpired: p.kill(); pytest.fail('it did not stop; where it stood:\n' + (tmp_path/'said').read_text()[-3000:])
    while any(map(alive, pids)) and time.time()<deadline: time.sleep(.05)
    assert len(pids)==2 and not any(map(alive, pids))

def test_summary_escapes_what_came_from_outside():
    def fail(x): raise InputError(f'<script>{x}</script>')
    s = map_items(fail, ['<b>'])
    assert '<script>' not in s._repr_html_() and '&lt;script&gt;' in s._repr_html_()
    def skip(x): raise Skip('done before')
    s = map_items(skip, range(3))
    assert s.skipped==3 and s.exit_code==0 and '0 items done, 3 skipped, 0 failed' in str(s)

def test_one_line_has_one_line(): assert '\n' not in one_line(ValueError('a\nb'))

def test_two_syncs_into_one_folder_do_no_harm(bucket, tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    data = os.urandom(40*2**20)
    write_bytes(f'{bucket}/ard/a-visual.tif', data)
    with ThreadPoolExecutor(2) as pool: both = list(pool.map(lambda _: sync(f'{bucket}/ard', tmp_path/'ard', proc=1), range(2)))
    assert (tmp_path/'ard/a-visual.tif').read_bytes()==data
    assert all('another sync is writing it' in why for s in both for _,why in s.failures) and any(s.done for s in both)

def test_hidden_folders_are_left_out_everywhere(bucket, tmp_path):
    for root in bucket, tmp_path/'d':
        write_bytes(f'{root}/.ipynb_checkpoints/x.json', b'1')
        write_bytes(f'{root}/a/x.json', b'1')
        assert [relative_path(o.path, root) for o in list_files(root)]==['a/x.json']

def test_an_empty_path_is_refused_and_not_taken_for_the_root(imagesim, tmp_path):
    write_bytes(tmp_path/'c/x.json', b'1')
    for args,env in ((['sync', 'c', ''], {}), (['init', '--root', ''], {}), (['demo', '--root', ''], {}), (['synth', '--root', ''], {}), (['init'], dict(IMAGESIM_DATA_ROOT=''))):
        p = imagesim(*args, env=env)
        assert p.returncode==2 and 'Traceback' not in p.stderr, (args, p.stderr)

def test_atomic_path_keeps_links_and_devices(tmp_path):
    write_bytes(tmp_path/'big/t', b'old')
    (tmp_path/'t').symlink_to(tmp_path/'big/t')
    write_bytes(tmp_path/'t', b'new')
    assert (tmp_path/'t').is_symlink() and (tmp_path/'big/t').read_bytes()==b'new'
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(InputError, match='not an ordinary file'): write_bytes(tmp_path/'pipe', b'')

def test_sync_between_buckets_takes_names_as_they_are(bucket, tmp_path):
    for name in 'a[1].tif', 'a1.tif', 'a*.tif', 'q?.tif': write_bytes(f'{bucket}/up/{name}', name.encode())
    assert sync(f'{bucket}/up', f'{bucket}/up2').done==4
    assert {relative_path(o.path, f'{bucket}/up2'):read_bytes(o.path) for o in list_files(f'{bucket}/up2')}=={n:n.encode() for n in ('a[1].tif', 'a1.tif', 'a*.tif', 'q?.tif')}

def test_sync_notices_older_content_of_equal_size(tmp_path):
    write_bytes(tmp_path/'a/x.json', b'AAAA')
    sync(tmp_path/'a', tmp_path/'b')
    write_bytes(tmp_path/'a/x.json', b'BBBB')
    os.utime(tmp_path/'a/x.json', (1e9, 1e9))
    assert sync(tmp_path/'a', tmp_path/'b').done==1 and (tmp_path/'b/x.json').read_bytes()==b'BBBB' and sync(tmp_path/'a', tmp_path/'b').skipped==1

def test_listing_survives_a_link_to_itself(tmp_path):
    write_bytes(tmp_path/'d/q/x', b'')
    (tmp_path/'d/q/up').symlink_to('..')
    assert [relative_path(o.path, tmp_path/'d') for o in list_files(tmp_path/'d')]==['q/x']

def leave(n): sys.exit(0)
def test_a_worker_that_leaves_is_a_failure():
    from functools import partial
    assert map_items(leave, [1, 2]).failed==2 and map_items(leave, [1, 2], proc=2).failed==2
    assert map_items(partial(pow, 2), [1, 2]).values==[2, 4]

def test_endpoint_without_scheme_and_folder_markers(bucket, imagesim, tmp_path):
    write_bytes(f'{bucket}/o/mark/', b'')
    write_bytes(f'{bucket}/o/x.json', b'1')
    assert sync(f'{bucket}/o', tmp_path/'o').exit_code==0
    with pytest.raises(InputError, match='is a file'): sync(f'{bucket}/o/x.json', tmp_path/'o1')
    p = imagesim('sync', 's3://b/ard', 'x', env=dict(AWS_ENDPOINT_URL='127.0.0.1:9'))
    assert p.returncode==2 and 'Traceback' not in p.stderr
