"""The figure of the study's tables"""
import pytest
from study import learning_figure


def test_figure_of_the_tables(tmp_path):
    """A block for each study, in it a point and an interval for each difference that its table has."""
    rows = [
        {'form': 'plain', 'seeds': 4},
        {'form': 'taylor', 'seeds': 4, 'minus_plain': 0.3, 'minus_plain_95': 0.2, 'minus_shuffled': -0.1,
         'minus_shuffled_95': 0.4},
        {'form': 'cal', 'seeds': 3, 'minus_plain': -1.0, 'minus_plain_95': 0.5}]
    figure = learning_figure.draw({'first': rows, 'second': rows[:2]})
    first, second = figure.axes
    (points, _, (bars,)), (hollow, _, _) = first.containers
    assert points.get_xdata().tolist() == [0.3, -1.0] and hollow.get_xdata().tolist() == [-0.1]
    ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([0.1, 0.5]), pytest.approx([-1.5, -0.5])]
    assert [label.get_text() for label in first.get_yticklabels()] == ['taylor  (4)', 'cal  (3)']
    assert len(second.get_yticks()) == 1 and second.get_title('left') == 'second'
    figure.savefig(tmp_path / 'figure.png')
    assert (tmp_path / 'figure.png').stat().st_size > 1000
