"""Throughline: attention, from translation to everything else, behind one JAX trainer."""

import pathlib

from setuptools import find_packages, setup

setup(
    name='throughline',
    version='0.1.0',
    description='The line of papers that took attention from translation to everything else, '
                'in JAX and Flax, behind one trainer',
    long_description=pathlib.Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    # configs, tests, benchmarks and main are used from a checkout, not installed.
    packages=find_packages(include=['core', 'core.*', 'detection', 'generative', 'graph', 'recsys',
                                    'translation', 'vit_family', 'vit_family.*']),
    install_requires=[
        'absl-py>=2.1,<3',
        'array-record>=0.8,<0.9',
        'etils[epath]>=1.12,<2',
        'flax>=0.12.8,<0.13',
        'grain>=0.2.18,<0.3',
        'jax>=0.10.2,<0.11',
        'matplotlib>=3.9,<4',
        'ml-collections>=1.1,<2',
        'ml-dtypes>=0.5,<0.7',
        'numpy>=2.0,<3',
        'opencv-python-headless>=4.11,<6',
        'optax>=0.2.8,<0.3',
        'orbax-checkpoint>=0.12.8,<0.13',
        'safetensors>=0.5,<1',
        'scikit-learn>=1.5,<2',        # carries the embedded handwritten digits
        'scipy>=1.14,<2',
        'tensorboardX>=2.6.2,<3',
        'tensorflow-datasets>=4.9.10,<5',  # reads prepared data without TensorFlow
        'threadpoolctl>=3.1,<4',       # fits of scikit-learn on one thread, see graph.evaluation
        'tqdm>=4.66,<5',
    ],
    extras_require={
        # koreanize-matplotlib carries NanumGothic, a font with Hangul, for pictures.
        'translation': ['koreanize-matplotlib>=0.1.1,<0.2', 'sacrebleu>=2.5,<3',
                        'tokenizers>=0.21,<0.24'],
        'detection': ['pycocotools>=2.0.11,<3'],
        # num2words checks our number words; the rest is what tested extras need.
        'test': ['chex>=0.1.91,<0.2', 'pillow>=11,<14', 'pytest>=8.3,<10', 'pytest-xdist>=3.6,<4',
                 'num2words>=0.5.14,<0.6', 'pycocotools>=2.0.11,<3', 'sacrebleu>=2.5,<3',
                 'tokenizers>=0.21,<0.24'],
        # On a TPU, and to compile for one elsewhere. Older ones describe some slices otherwise.
        'tpu': ['libtpu>=0.0.51,<0.1'],
        'torch': ['torch>=2.6,<3'],    # reads .pth files
        'gcs': ['etils[epath-gcs]>=1.12,<2'],  # config.init_from=gs://...
        'cuda': ['jax[cuda13]>=0.10.2,<0.11'],
        # For some tfds sets; never imported in training.
        'prepare': ['tensorflow>=2.18,<3', 'apache-beam>=2.60,<3', 'importlib_resources>=6,<8'],
        # torch first, so that pip takes this build and not the newest with its CUDA packages.
        'parity': ['torch==2.13.0', 'transformers>=5.23.0,<6', 'gensim>=4.4,<5'],
    },
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3.11',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
