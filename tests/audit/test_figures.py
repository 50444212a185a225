"""Figures, the report in a browser, and the comparison of two networks"""
import csv
import dataclasses
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from networks import make_model
from safetensors.torch import save_file

from dreal_timm import DrealTask
from dreal_timm.audit import (
    Audit,
    audit,
    audit_model,
    bootstrap,
    channel_attention,
    compare_audits,
    compare_models,
    format_summary,
    gain_along_depth,
    reliability_diagram,
    reward_distribution,
    spatial_attention,
    summarize,
    training_curves,
)
from dreal_timm.audit.examples import Examples, extremes
from dreal_timm.audit.report import draw_figures, write_report
from dreal_timm.cli import main

OPTIONS = {'workers': 0, 'device': 'cpu', 'resamples': 50}
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.fixture(scope='module')
def audited(run_folder, images, tmp_path_factory):
    """The folder of the audit of the run."""
    output = tmp_path_factory.mktemp('figures') / 'run'
    audit_model(str(run_folder), str(images), output, **OPTIONS)
    return output


@pytest.fixture(scope='module')
def compared(run_folder, audited, images, tmp_path_factory):
    """The folder of a comparison of the run's exported network with the weights of its other epoch."""
    output = tmp_path_factory.mktemp('figures') / 'compared'
    best = torch.load(run_folder / 'model_best.pth.tar', weights_only=True)['epoch']
    checkpoint = torch.load(run_folder / f'checkpoint-{1 - best}.pth.tar', weights_only=True)
    other = tmp_path_factory.mktemp('figures') / 'first-epoch'
    shutil.copytree(run_folder / 'model', other)
    save_file(checkpoint['state_dict'], other / 'model.safetensors')
    (other / 'SHA256SUMS').unlink()  # other weights are what is wanted here
    compare_models([str(other), str(audited)], output, str(images), ['before', 'after'], **OPTIONS)
    return output


def test_channel_attention(audited):
    """Each plot holds mean and a band of three variances of the last site of a group, a row for each network."""
    found = Audit.load(audited)
    figure = channel_attention({'a': found, 'b': found})
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 8
    names = [axis.get_title() for axis in figure.axes[:4]]
    assert names == [f'layer{k}.0.se.channel' for k in (1, 2, 3, 4)]
    for axis, name in zip(figure.axes, names, strict=False):
        mean, variance = found.maps[name].mean.flatten().numpy(), found.maps[name].variance.flatten().numpy()
        np.testing.assert_allclose(axis.lines[0].get_ydata(), mean)
        band = axis.collections[0].get_paths()[0].vertices[:, 1]
        assert band.max() == pytest.approx((mean + 3 * variance).max())
        assert band.min() == pytest.approx((mean - 3 * variance).min())
    with pytest.raises(ValueError, match='No site'):
        channel_attention({'a': found}, [])


def test_gain_along_depth(audited):
    """Points are the means of the summary, bars its intervals, one a site."""
    summary = summarize(Audit.load(audited), resamples=50)
    figure = gain_along_depth({'a': summary}, 'top1_gain')
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == [row['site'] for row in summary['sites']]
    own, constant = axis.containers
    np.testing.assert_allclose(own[0].get_xdata(), [row['top1_gain'] for row in summary['sites']])
    np.testing.assert_allclose(constant[0].get_xdata(), [row['constant_top1_gain'] for row in summary['sites']])
    bars = own[2][0].get_segments()
    np.testing.assert_allclose([bar[:, 0] for bar in bars], [
        [row['top1_gain_low'], row['top1_gain_high']] for row in summary['sites']], atol=1e-12)
    assert len(gain_along_depth({'a': summary, 'b': summary}).axes[0].containers) == 2


def test_reward_distribution(audited):
    """The line in a box is the median reward of the images that are right."""
    found = Audit.load(audited)
    figure = reward_distribution({'a': found})
    medians = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_linewidth() == 2]
    expected = found.rewards()[found.right].numpy()
    np.testing.assert_allclose(medians, np.percentile(expected, 50, axis=0), rtol=1e-6)


def test_reliability_diagram(audited):
    """One plot a site; without a critic there is none."""
    found = Audit.load(audited)
    figure = reliability_diagram(found)
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == found.names
    model = make_model('se')
    plain = audit(model, [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]))], input_size=(3, 64, 64))
    with pytest.raises(ValueError, match='without a critic'):
        reliability_diagram(plain)


def test_spatial_attention(audited):
    """Image and maps stand side by side; the map that is drawn is the one that was kept."""
    examples = Examples.load(audited)
    assert examples.shown.dtype == np.uint8
    assert len(examples.shown) == 3  # one of each class
    maps = [{name: attention[i] for name, attention in examples.maps.items()} for i in range(len(examples.shown))]
    figure = spatial_attention(list(examples.shown), maps)
    assert len(figure.axes) == 3 * (1 + len(examples.maps))
    drawn = figure.axes[1].images[1].get_array()
    np.testing.assert_allclose(drawn, maps[0][next(iter(examples.maps))].numpy())


def test_training_curves(run_folder, tmp_path):
    """The curves are the columns of summary.csv; another folder, or a plain run, is an error."""
    figure = training_curves(run_folder)
    with (run_folder / 'summary.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [float(row['train_reward']) for row in rows])
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), [float(row['train_quality']) for row in rows])
    with pytest.raises(FileNotFoundError, match=r'summary\.csv'):
        training_curves(tmp_path)
    (tmp_path / 'summary.csv').write_text('epoch,train_loss,lr\n0,1.0,0.1\n')
    with pytest.raises(ValueError, match='not a reinforced run'):
        training_curves(tmp_path)


def test_extremes(audited):
    """The images that a site helps or hurts most, by the change of probability."""
    found = Audit.load(audited)
    gain = found.log_p.exp() - found.mean_log_p[:, 1].exp()
    helped, hurt = extremes(found, found.names[1], 2)
    assert all(gain[row] > 0 for row in helped)
    assert all(gain[row] < 0 for row in hurt)
    assert helped == gain.argsort(descending=True)[:2].tolist()[:len(helped)]
    assert hurt == gain.argsort()[:2].tolist()[:len(hurt)]
    pictures = Examples.load(audited).pictures
    assert {int(found.number[row]) for row in [*helped, *hurt]} <= set(pictures)


def test_the_report_needs_nothing_else(audited, compared):
    """No address but of the page itself; every picture has a text; numbers and provenance are there."""
    for folder in (audited, compared):
        page = (folder / 'report.html').read_text()
        links = re.findall(r'(?:src|href)="([^"]*)"', page) + re.findall(r'url\(([^)]*)\)', page)
        assert all(link.startswith(('data:image/png;base64,', '#')) for link in links)
        images = re.findall(r'<img [^>]*>', page)
        assert images
        assert all(re.search(r'alt="[^"]+"', image) for image in images)
        drawings = re.findall(r'<svg [^>]*>', page)
        assert len(drawings) >= 4
        assert all('role="img" aria-label="' in drawing for drawing in drawings)
    content = json.loads((audited / 'audit.json').read_text())
    page = html.unescape((audited / 'report.html').read_text())
    assert torch.__version__ in page
    assert content['provenance']['weights'] in page
    for row in content['sites']:
        assert f"{row['reward']:+.4f}" in page


@pytest.mark.parametrize(('count', 'wrong'), [(1, 0), (1, 1), (3, 3)])
def test_few_images_and_none_right(attention, count, wrong, tmp_path):
    """One image, or none that is right: what cannot be told is left out, and all is written."""
    model = make_model(attention).eval()
    images = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    target = model(images).argmax(1)
    target[:wrong] = (target[:wrong] + 1) % 7
    task = DrealTask(model, input_size=(3, 64, 64), verbose=False)
    found = audit(model, [(images, target)], input_size=(3, 64, 64), critic=task.get_trainable_module().critic)
    summary = summarize(found, resamples=10)
    assert (summary['sites'][0]['reward'] is None) == (count == wrong)
    assert summary['network']['wrong'] == pytest.approx(100 * wrong / count)
    name, none = '<b> & "it"', Examples({}, np.zeros((0, 1, 1, 3), dtype=np.uint8), {})
    drawn = draw_figures({name: found}, {name: summary}, {name: none})
    write_report(tmp_path / 'report.html', {name: found}, {name: summary}, {name: none}, drawn)
    assert '<b>' not in (tmp_path / 'report.html').read_text()
    found.save(tmp_path, summary)
    loaded = Audit.load(tmp_path)
    assert summarize(loaded, resamples=10) == summary
    assert ('-' if count == wrong else f"{summary['sites'][0]['reward']:+.4f}") in format_summary(summary)


SCRIPT = '''
<!DOCTYPE html><html><body><iframe id="f" style="width:WIDTHpx;height:800px;border:0"></iframe>
<pre id="result">nothing</pre><script>
const page = PAGE, frame = document.getElementById("f");
frame.srcdoc = page;
frame.onload = () => {
  const d = frame.contentDocument, w = frame.contentWindow;
  const column = name => [...d.querySelectorAll("table.sortable thead th")].findIndex(h => h.textContent === name);
  const order = () => [...d.querySelector("table.sortable tbody").rows].map(r => r.cells[0].textContent);
  const first = order(), head = d.querySelectorAll("table.sortable thead button")[column("reward")];
  head.click(); const down = order(), sorted = head.parentElement.getAttribute("aria-sort");
  head.click(); const up = order();
  d.querySelectorAll("details").forEach(e => e.open = true);
  const result = {
    first, down, up, sorted, wide: d.documentElement.scrollWidth, view: w.innerWidth,
    background: w.getComputedStyle(d.body).backgroundColor, ink: w.getComputedStyle(d.body).color,
    drawings: [...d.querySelectorAll("svg[role=img]")].map(s => s.getBoundingClientRect().height),
    images: [...d.images].map(i => i.naturalWidth),
    requests: w.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
  };
  document.getElementById("result").textContent = JSON.stringify(result);
};
</script></body></html>
'''


def browse(page, folder, width, dark):
    """What a page is like in a browser that nobody sees, inside a frame of some width."""
    wrapper = folder / 'wrapper.html'
    text = json.dumps(page).replace('</', '<\\/')
    wrapper.write_text(SCRIPT.replace('WIDTH', str(width)).replace('PAGE', text))
    done = subprocess.run([
        CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
        '--disable-background-networking', '--disable-component-update', '--disable-sync',
        f'--user-data-dir={folder / "profile"}', f'--blink-settings=preferredColorScheme={0 if dark else 1}',
        '--virtual-time-budget=10000', '--window-size=1300,900', '--dump-dom', f'file://{wrapper}',
    ], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')
@pytest.mark.parametrize(('width', 'dark'), [(360, False), (1200, True)])
@pytest.mark.parametrize('kind', ['audited', 'compared'])
def test_the_report_in_a_browser(kind, width, dark, request, tmp_path):
    """In a real browser: it fits a phone, the table sorts, pictures show, colours follow the scheme, nothing loads."""
    folder = request.getfixturevalue(kind)
    seen = browse((folder / 'report.html').read_text(), tmp_path, width, dark)
    source = folder if kind == 'audited' else folder / 'first'
    rows = json.loads((source / 'audit.json').read_text())['sites']
    rewards = {row['site']: row['reward'] for row in rows}
    assert seen['first'] == [row['site'] for row in rows]
    assert [rewards[name] for name in seen['down']] == sorted(rewards.values(), reverse=True)
    assert [rewards[name] for name in seen['up']] == sorted(rewards.values())
    assert seen['sorted'] == 'descending'
    assert seen['view'] == width
    assert seen['wide'] <= width
    light = sum(map(int, re.findall(r'\d+', seen['background'])[:3])) > 600
    assert light == (not dark)
    assert all(height > 50 for height in seen['drawings'])
    assert seen['images']
    assert min(seen['images']) > 0
    assert seen['requests'] == []


def test_comparison_by_hand(audited, compared):
    """Differences are paired, second less first; rewards over the images that both get right."""
    first, second = Audit.load(compared / 'first'), Audit.load(audited)
    number = torch.arange(12)
    first = dataclasses.replace(first, right=number > 2)  # both networks are right on all of these images
    second = dataclasses.replace(second, right=(number < 8) & (number > 0))
    found = compare_audits(first, second, resamples=100)
    assert found['network']['top1'] == pytest.approx(100 * (7 - 9) / 12)
    assert found['network']['log_likelihood'] == pytest.approx((second.log_p - first.log_p).double().mean().item())
    assert found['network']['log_likelihood'] != 0
    both = first.right & second.right
    assert both.sum() == 5
    row = found['sites'][2]
    difference = second.rewards()[both, 2].double() - first.rewards()[both, 2].double()
    assert row['reward'] == pytest.approx(difference.mean().item())
    _, low, high = bootstrap((second.gain - first.gain).double()[:, 2:3], resamples=100)
    assert (row['log_likelihood_gain_low'], row['log_likelihood_gain_high']) == pytest.approx((low.item(), high.item()))
    assert compare_audits(first, first, resamples=10)['sites'][0]['reward'] == 0
    with pytest.raises(ValueError, match='different images'):
        compare_audits(first, dataclasses.replace(second, number=second.number + 1))


def test_compare_command(audited, compared, tmp_path, capsys):
    """Finished audits are compared without the data; a network alone needs it; nothing is overwritten."""
    content = json.loads((compared / 'compare.json').read_text())
    assert (content['first'], content['second'], content['images']) == ('before', 'after', 12)
    finished = [str(compared / 'first'), str(audited)]
    output = ['--output', str(tmp_path / 'out')]
    assert main(['compare', *finished, *output]) == 0
    out = capsys.readouterr().out
    assert 'run less first, 12 images: top-1' in out
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        'compare.csv', 'compare.json', 'figures', 'report.html']
    assert main(['compare', *finished, *output]) == 2
    assert 'holds a finished audit' in capsys.readouterr().err
    assert main(['compare', finished[0], finished[0], '--output', str(tmp_path / 'same')]) == 2
    assert 'two networks of different names' in capsys.readouterr().err
    assert main(['compare', finished[0], 'test_resnet', '--output', str(tmp_path / 'none')]) == 2
    assert '--data DIR' in capsys.readouterr().err
    assert not (tmp_path / 'none').exists()


def test_a_stopped_comparison_goes_on(compared, run_folder, images, tmp_path, monkeypatch):
    """With resume the audit that was finished is kept, and the other one made."""
    models = [str(run_folder / 'model'), str(run_folder)]
    made = []
    plain = audit_model

    def stopping(model, *args, **kwargs):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(model)
        return plain(model, *args, **kwargs)

    monkeypatch.setattr('dreal_timm.audit.compare.audit_model', stopping)
    with pytest.raises(KeyboardInterrupt):
        compare_models(models, tmp_path / 'out', str(images), **OPTIONS)
    monkeypatch.setattr('dreal_timm.audit.compare.audit_model', lambda model, *args, **kwargs: (
        made.append(model), plain(model, *args, **kwargs)))
    with pytest.raises(FileExistsError):
        compare_models(models, tmp_path / 'out', str(images), **OPTIONS)
    found = compare_models(models, tmp_path / 'out', str(images), resume=True, **OPTIONS)
    assert made == models
    assert found['network']['top1'] == 0
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'report.html').write_text('my own')
    with pytest.raises(FileExistsError):
        compare_models(models, tmp_path / 'mine', str(images), resume=True, **OPTIONS)
