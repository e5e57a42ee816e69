"""Painting a mask in the browser: a canvas over a picture, whose strokes go as a small PNG into a hidden field."""

from __future__ import annotations

import html

from PIL import Image

from pagoda.evaluation.page import data_uri

FIELD = "edit-mask"
"""Anchor of the hidden field."""
_LONGEST = 768
"""Side of the picture that is painted on, in pixels: the mask is as fine as that."""

# Events are caught for the whole document: the canvas comes and goes with each upload.
SCRIPT = """
(() => {
  const field = () => document.querySelector('#edit-mask textarea, #edit-mask input');
  const tell = value => { const f = field(); if (!f) return;
    f.value = value; f.dispatchEvent(new Event('input', {bubbles: true})); };
  const ready = canvas => { if (canvas.dataset.ready) return;
    const image = canvas.parentElement.querySelector('img');
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight; canvas.dataset.ready = '1'; };
  const at = (canvas, event) => { const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height]; };
  let last = null;
  const stroke = (canvas, to) => { const c = canvas.getContext('2d');
    c.strokeStyle = c.fillStyle = '#e6007a'; c.lineCap = c.lineJoin = 'round';
    c.lineWidth = Math.max(1, Math.max(canvas.width, canvas.height) * canvas.dataset.brush / 100);
    c.beginPath(); c.moveTo(...(last || to)); c.lineTo(...to); c.stroke();
    c.beginPath(); c.arc(...to, c.lineWidth / 2, 0, 7); c.fill(); last = to; };
  const send = canvas => { const out = document.createElement('canvas'); out.width = canvas.width; out.height = canvas.height;
    const c = out.getContext('2d'), from = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < from.data.length; i += 4) { const on = from.data[i + 3] > 127 ? 255 : 0;
      from.data[i] = from.data[i + 1] = from.data[i + 2] = on; from.data[i + 3] = 255; }
    c.putImageData(from, 0, 0); tell(out.toDataURL('image/png')); };
  const painter = event => event.target instanceof Element ? event.target.closest('canvas.paint') : null;
  document.addEventListener('pointerdown', event => { const canvas = painter(event); if (!canvas) return;
    event.preventDefault(); ready(canvas); canvas.setPointerCapture(event.pointerId); last = null; stroke(canvas, at(canvas, event)); });
  document.addEventListener('pointermove', event => { const canvas = painter(event);
    if (canvas && event.buttons) { ready(canvas); stroke(canvas, at(canvas, event)); } });
  document.addEventListener('pointerup', event => { const canvas = painter(event); if (canvas) { last = null; send(canvas); } });
  document.addEventListener('click', event => { const button = event.target instanceof Element && event.target.closest('button.unpaint');
    if (!button) return;
    const canvas = button.closest('.painter').querySelector('canvas'); ready(canvas);
    canvas.getContext('2d').clearRect(0, 0, canvas.width, canvas.height); tell(''); });
})();
"""


def painter(image: Image.Image, brush: int = 6) -> str:
    """A picture to paint a hole on, as HTML.

    Args:
        image: The upload.
        brush: Width of a stroke, in percent of the longer side.
    """
    shown = image.convert("RGB")
    shown.thumbnail((_LONGEST, _LONGEST))
    if max(shown.size) < _LONGEST // 2:  # strokes on tiny images would be a handful of blocks
        factor = _LONGEST // 2 // max(shown.size)
        shown = shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)
    what = html.escape(f"the uploaded image, {image.width} x {image.height} px")
    return (
        f'<div class="pagoda painter"><div class="easel"><img alt="{what}" src="{data_uri(shown)}" '
        f'width="{shown.width}" height="{shown.height}"><canvas class="paint" data-brush="{brush}" aria-hidden="true"></canvas></div>'
        f'<p class="note">{what}. Paint over what shall be made anew, or type boxes below. '
        '<button type="button" class="unpaint">Wipe off</button></p></div>'
    )
