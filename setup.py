"""The package, what it needs to run, and the extras for those who need more.

A lower bound is the release this code was written and tested with; an upper bound is the next
release line that its project allows itself to break things in.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

REQUIREMENTS = [
    # The model and its training.
    "jax>=0.10.2,<0.11",  # arrays, gradients, compilation; CPU unless an extra adds more
    "flax>=0.12.8,<0.13",  # Linen modules
    "optax>=0.2.8,<0.3",  # AdamW, schedules, frozen partitions, accumulation
    "orbax-checkpoint>=0.12.8,<0.13",  # checkpoints, whole and sharded
    "etils[epath]>=1.15,<2",  # paths of Orbax, in folders and buckets alike
    "einops>=0.8.2,<0.9",  # reshapes that say what they mean
    "jaxtyping>=0.3.11,<0.4",  # shapes in signatures
    "numpy>=2.4,<3",  # everything on the host: drags, tracks, scenes
    "scipy>=1.17,<2",  # PCHIP paths, smooth jitter, statistics
    # Data.
    "grain>=0.2.18,<0.3",  # deterministic, sharded, resumable batches
    "array-record>=0.8.6,<0.9",  # the file format of prepared clips
    "tensorflow-datasets>=4.9.10,<5",  # describes prepared clips to TFDS readers; no TensorFlow
    "fsspec>=2026.9,<2028",  # videos and prepared clips in buckets
    "protobuf>=6.33,<8",  # parses a record; Beam needs the 6
    "av>=18,<19",  # decodes and encodes video; its wheels bring FFmpeg
    "opencv-python-headless>=5,<6",  # Lucas-Kanade tracks, DIS flow, drawing of scenes
    "pillow>=12.1.1,<14",  # reads pictures, draws overlays and contact sheets; Beam needs the 12
    "ftfy>=6.3.1,<7",  # mends captions as CLIP's tokenizer did when its text towers were trained
    # Programs.
    "absl-py>=2.5,<3",  # flags and logging of the command-line programs
    "ml-collections>=1.1,<2",  # configs/*.py and their --config overrides
    "tensorboard>=2.21,<3",  # writes scalars and sample videos; no TensorFlow
    "ml-dtypes>=0.6,<0.7",  # bfloat16 arrays in files of weights; what jax itself uses
]

EXTRAS = {
    # Train and sample on Cloud TPU: adds libtpu.
    "tpu": ["jax[tpu]>=0.10.2,<0.11"],
    # Train and sample on NVIDIA GPUs: adds the CUDA 12 plugin and libraries.
    "cuda12": ["jax[cuda12]>=0.10.2,<0.11"],
    # Prepare clips on many machines: the same preparation on Beam's runners. Beam holds protobuf,
    # pyarrow and NumPy back, hence not among the requirements.
    "prepare": ["apache-beam>=2.77,<3"],
    # Clips and runs in Google's buckets (gs://).
    "gcs": [
        "gcsfs>=2026.9,<2028",  # fsspec's driver; its versions go with fsspec's
        "google-cloud-storage>=3.17,<4",  # what Orbax asks for buckets with
    ],
    # Draw drags in the browser: the local server of the drag page.
    "app": [
        "starlette>=1.10,<2",  # routes and static files
        "uvicorn>=0.54,<0.55",  # serves them
        "python-multipart>=0.0.34,<0.1",  # uploaded pictures
    ],
    # Read .pth checkpoints, and compare with the networks of others in tests and benchmarks.
    "torch": [
        "torch>=2.13,<2.14",  # opens files of weights; the other side of benchmarks/unet.py
        "diffusers>=0.42.1,<0.43",  # SVD's U-Net and autoencoder
        "transformers>=5.23,<6",  # CLIP
    ],
    # Work on this package: what `make test` and `make lint` run.
    "test": [
        "pytest>=9.2,<10",
        "pytest-xdist>=3.8,<4",  # one process per core
        "safetensors>=0.8,<0.9",  # the format's own library, to compare our files with
        "ruff>=0.17.6,<0.18",  # its formatting may change with every minor release
    ],
}


def version() -> str:
    """`__version__`, read rather than imported: nothing is installed yet when this runs."""
    source = (HERE / "nuwa_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)


if __name__ == "__main__":
    setup(
        name="nuwa_jax",
        version=version(),
        description="Drag-controlled video generation, trained and sampled in JAX",
        long_description=(HERE / "README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        author="The nuwa_jax authors",
        license="MIT",
        python_requires=">=3.11",
        packages=find_packages(include=["nuwa_jax", "nuwa_jax.*"]),
        # The shipped model with its card, and the picture and drags to try it on.
        package_data={"nuwa_jax": ["assets/*", "assets/**/*"]},
        install_requires=REQUIREMENTS,
        extras_require=EXTRAS,
    )
