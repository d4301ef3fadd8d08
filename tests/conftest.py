"""What several test files need: a real S3 server, the real data where it is present, the command line as the shell runs it."""
import os, re, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent/'shared'/'data'

# no test reaches a real account, and none depends on the settings of whoever runs it
for k in [k for k in os.environ if k.startswith(('IMAGESIM_', 'AWS_'))]: del os.environ[k]
os.environ.update(AWS_ACCESS_KEY_ID='nobody', AWS_SECRET_ACCESS_KEY='nothing', AWS_DEFAULT_REGION='us-east-1', AWS_EC2_METADATA_DISABLED='true',
                  AWS_CONFIG_FILE='/dev/null', AWS_SHARED_CREDENTIALS_FILE='/dev/null', IMAGESIM_PROGRESS='false')

# the same examples in every run, so that what fails is the change's doing; HYPOTHESIS_PROFILE=default draws new ones
settings.register_profile('repeatable', derandomize=True)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'repeatable'))

@pytest.fixture(scope='session')
def shared():
    "The folder of real data beside the project"
    if not SHARED.is_dir(): pytest.skip('the real data is not beside the project')
    return SHARED

@pytest.fixture(scope='session')
def s3_server():
    "A moto server on this machine"
    from moto.server import ThreadedMotoServer
    import logging
    logging.getLogger('werkzeug').setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    yield 'http://{}:{}'.format(*server.get_host_and_port())
    server.stop()

@pytest.fixture
def bucket(s3_server, monkeypatch):
    "An empty bucket, as an s3:// URL"
    import boto3, uuid
    monkeypatch.setenv('AWS_ENDPOINT_URL', s3_server)
    name = f'b{uuid.uuid4().hex[:12]}'
    boto3.client('s3', endpoint_url=s3_server).create_bucket(Bucket=name)
    return f's3://{name}'

@pytest.fixture
def imagesim(tmp_path):
    "Run the `imagesim` command in a process of its own, in an empty folder"
    def run(*args, env=None, timeout=120, module='imagesim.cli'):
        return subprocess.run([sys.executable, '-m', module, *map(str,args)], cwd=tmp_path, env={**os.environ, 'PYTHONPATH':str(ROOT), **(env or {})},
                              capture_output=True, text=True, timeout=timeout)
    return run

@pytest.fixture(scope='session')
def town(tmp_path_factory):
    "Where a data root lies that files and workers share; whoever needs it first makes it (test_serve.furnish), and nobody writes into it"
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get('PYTEST_XDIST_WORKER') else base)/'town'

@pytest.fixture
def here(tmp_path, monkeypatch, capfd):
    "Run the command in this process, where a test needs many and has shown with `imagesim` that the shell's way works: imports are paid once"
    from types import SimpleNamespace
    def run(*args, env=None):
        from imagesim.cli import main
        capfd.readouterr()
        with monkeypatch.context() as m:
            m.chdir(tmp_path)
            for k,v in (env or {}).items(): m.setenv(k, v)
            with pytest.raises(SystemExit) as end: main([*map(str, args)])
        out, err = capfd.readouterr()
        return SimpleNamespace(returncode=end.value.code or 0, stdout=out, stderr=err)
    return run

NEEDS = dict(torch=r'\bimport torch\b|imagesim\.(loader|loss|model|augment|train|bundle|encode|audit)\b', fastapi=r'imagesim\.serve\b')

def pytest_ignore_collect(collection_path):
    "Leave out files whose subject needs a package of an extra that is not installed"
    if collection_path.suffix!='.py' or not collection_path.name.startswith('test_'): return None
    text = collection_path.read_text(encoding='utf-8')
    return any(find_spec(p) is None and re.search(pattern, text, re.M) for p,pattern in NEEDS.items()) or None

LONG = 'cli', 'train', 'synth', 'extract', 'page', 'serve', 'loader', 'chip', 'labels', 'encode', 'osm', 'dataset', 'mosaic', 'nodata', 'similarity', 'explore'

def pytest_collection_modifyitems(items):
    "Begin with the files that take longest, so that no worker is left alone with one at the end"
    rank = {f'test_{n}':i for i,n in enumerate(LONG)}
    items.sort(key=lambda t: rank.get(t.path.stem, len(LONG)))
