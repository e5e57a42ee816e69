"""A page in which anyone draws images in their own browser, from a double click and without a network.

`index.html` is whole: the model, onnxruntime's WebAssembly and the script lie in it. A page that is opened from a disk can fetch
nothing, neither modules nor binaries, so a folder of files would have needed a server. What is large is compressed by gzip and
written in base64, which browsers undo by themselves.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pagoda.errors import ArtifactError, ConfigError, ShapeError
from pagoda.export.facts import FACTS, Exported, export_facts
from pagoda.export.onnx import ONNX_TOLERANCE, Weights, check_weights, need_onnx, shrink_weights
from pagoda.export.web_parts import WebPart, compare_parts, trace_parts
from pagoda.export.web_runtime import RUNTIME_NAME, RUNTIME_VERSION, WebRuntime, find_runtime
from pagoda.files import write_text_atomic
from pagoda.networks import OneStepGenerator, PixelCodec
from pagoda.version import __version__

PAGE = "index.html"
_SOURCES = Path(__file__).parent / "page"
_FEWEST = 16
_LICENCE = """This page holds ONNX Runtime Web, Copyright (c) Microsoft Corporation, under the MIT License:

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation files \
(the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, modify, merge, \
publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do \
so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF \
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE \
FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN \
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""


def export_web(
    generator: OneStepGenerator,
    folder: Path | str,
    *,
    size: int | None = None,
    weights: Weights = "float16",
    name: str = "generator",
    class_names: Sequence[str] | None = None,
    runtime: Path | str | None = None,
) -> Exported:
    """Write a folder with `index.html`, which draws images of every size up to `size`, and `pagoda.json`.

    Args:
        generator: Of a finished run.
        folder: Folder to write; its two files are replaced, others are refused.
        size: Side of the largest images, in pixels; the generator's largest when None.
        weights: As in `export_onnx`. float16 halves what has to be sent, and is calculated in float32.
        name: Title of the page, and of the files that it saves.
        class_names: Names of the classes, in the order of the labels; numbers when None.
        runtime: Where onnxruntime-web is, see `find_runtime`; from npm when None.

    Raises:
        ArtifactError: other files in `folder`, no onnxruntime-web, or a float32 graph that differs from PyTorch by more than
            `ONNX_TOLERANCE`.
        ConfigError: unknown weights.
        MissingExtraError: the extra `export` is not installed.
        ShapeError: the generator has no level of that size, takes fewer than 16 numbers, or makes neither grey nor RGB images.
    """
    folder = Path(folder)
    check_weights(weights)
    onnx = need_onnx()
    others = [path.name for path in folder.iterdir() if path.name not in (PAGE, FACTS)] if folder.is_dir() else []
    if folder.is_file() or others:
        raise ArtifactError(f"{folder} holds other things than a page of pagoda ({others[:3]}); choose another --out.")
    if not isinstance(generator.codec, PixelCodec):
        raise ConfigError(
            "a page draws what the generator makes, and this one makes latents; export an ONNX graph instead, which decodes them."
        )
    if generator.channels not in (1, 3) or generator.channels * generator.base_size**2 < _FEWEST:
        raise ShapeError(
            f"a page draws grey or RGB images from at least {_FEWEST} numbers, this generator takes noise of "
            f"{generator.channels} x {generator.base_size} x {generator.base_size}. Export an ONNX graph instead."
        )
    engine = find_runtime(runtime)
    parts = trace_parts(generator, size)
    difference, psnr = compare_parts(generator, parts)
    if not difference <= ONNX_TOLERANCE:
        raise ArtifactError(
            f"the graphs differ from PyTorch by {difference:.2g}, accepted are {ONNX_TOLERANCE:g}. "
            "Nothing was written; try the versions in constraints.txt."
        )
    if weights != "float32":
        parts = [WebPart(size=part.size, model=shrink_weights(part.model, weights)) for part in parts]
        difference, psnr = compare_parts(generator, parts)
    for part in parts:
        onnx.checker.check_model(part.model)
    facts = export_facts(
        generator,
        size=parts[-1].size,
        sizes=[part.size for part in parts],
        weights=weights,
        difference=difference,
        runtime=RUNTIME_VERSION,
        name=name,
        class_names=None if class_names is None else list(class_names),
    )
    write_text_atomic(folder / PAGE, _page(facts, parts, engine))
    write_text_atomic(folder / FACTS, json.dumps(facts, indent=1))
    return Exported(path=folder / PAGE, difference=difference, psnr=psnr)


def _page(facts: Mapping[str, Any], parts: Sequence[WebPart], engine: WebRuntime) -> str:
    style = (_SOURCES / "style.css").read_text(encoding="utf-8")
    script = _script(engine)
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_digest(script)}' 'wasm-unsafe-eval'",
            f"style-src '{_digest(style)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    contents = [("wasm", engine.wasm), *((f"part-{i}", part.model.SerializeToString()) for i, part in enumerate(parts))]
    blocks = [f'<script type="application/octet-stream" id="{name}">{_pack(data)}</script>' for name, data in contents]
    filled = {
        "POLICY": policy,
        "TITLE": html.escape(facts["name"]),
        "STYLE": style,
        "FACTS": _facts_list(facts),
        "LICENCE": html.escape(_LICENCE),
        "VERSION": html.escape(__version__),
        "MODEL": json.dumps(facts).replace("<", "\\u003c"),  # so that no name can end the element
        "BLOCKS": "\n".join(blocks),
        "SCRIPT": script,
    }
    page = (_SOURCES / "page.html").read_text(encoding="utf-8")
    return re.sub(
        r"@([A-Z]+)@", lambda match: filled[match[1]], page
    )  # in one pass: what was filled in is not read again


def _script(engine: WebRuntime) -> str:
    """onnxruntime's module, and after it the page's own code, which receives what the module exports."""
    end = re.search(r"export\{([^{}]*)\};?\s*(//# sourceMappingURL=\S*)?\s*$", engine.script)
    exported = dict(re.findall(r"(\S+) as (\w+)", end[1].replace(",", " "))) if end else {}
    by_name = {public: local for local, public in exported.items()}
    wanted = ("InferenceSession", "Tensor", "env")
    assert end is not None, "the file is the pinned one"
    assert set(wanted) <= by_name.keys(), "the file is the pinned one"
    ours = "\n".join((_SOURCES / name).read_text(encoding="utf-8") for name in ("noise.js", "app.js"))
    given = ",".join(f"{public}:{by_name[public]}" for public in wanted)
    script = f'{engine.script[: end.start()]}\n(function(ort){{"use strict";\n{ours}}})({{{given}}});\n'
    for token in ("</script", "<!--"):
        assert token not in script.lower(), "a script inside of a page cannot hold the end of itself"
    return script


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _pack(content: bytes) -> str:
    # Without a time of day, so that the same model gives the same page.
    return base64.b64encode(gzip.compress(content, compresslevel=9, mtime=0)).decode("ascii")


def _facts_list(facts: Mapping[str, Any]) -> str:
    rows = {
        "Model": facts["model"][:16],
        "Sizes": ", ".join(f"{size} px" for size in facts["sizes"]),
        "Classes": facts["num_classes"] or "none",
        "Weights": f"{facts['weights']}, images differ from PyTorch's by {facts['difference']:.1g} of 2 at most",
        "Runs on": f"{RUNTIME_NAME} {facts['runtime']}, WebAssembly, one thread",
    }
    return "".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in rows.items())
