"Packaging for imagesim: everything is read from settings.ini, so that nbdev and pip share one source."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
ini = ConfigParser(delimiters=['='], interpolation=None)
ini.read(HERE/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

def names(key): return cfg.get(key, '').split()

extras = {k.removesuffix('_requirements'): names(k) for k in cfg if k.endswith('_requirements')}
extras['all'] = sorted({r for k,reqs in extras.items() if k!='dev' for r in reqs})

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(HERE/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'].split(),
    packages=find_packages(include=['imagesim', 'imagesim.*']),
    include_package_data=True,
    package_data={'imagesim': ['assets/**/*', 'static/**/*']},
    python_requires=f">={cfg['min_python']}",
    install_requires=names('requirements'),
    extras_require=extras,
    entry_points={'console_scripts': names('console_scripts'),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Natural Language :: English', 'Programming Language :: Python :: 3',
                 'Topic :: Scientific/Engineering :: GIS'],
    zip_safe=False,
)
