"""ReviewKD's fusion and pyramid distance against plain loops, in float64."""

import pytest
import torch

from vision_kd.detection.review import AttentionFusion, ReviewFusion, pyramid_distance, review_distance


def pooled(values, size):
    """Adaptive average pooling written as a loop over cells: cell i covers floor(i H / s) to ceil((i + 1) H / s)."""
    height, width = values.shape[-2:]
    result = torch.empty(*values.shape[:2], size, size, dtype=values.dtype)
    for i in range(size):
        for j in range(size):
            rows = slice(i * height // size, -(-(i + 1) * height // size))
            columns = slice(j * width // size, -(-(j + 1) * width // size))
            result[:, :, i, j] = values[:, :, rows, columns].mean((-2, -1))
    return result


@pytest.mark.parametrize(("shape", "sizes"), [((7, 9), (4, 2, 1)), ((4, 6), (2, 1)), ((2, 3), (1,)), ((1, 2), ())])
def test_pyramid_distance_against_a_loop(shape, sizes):
    student, teacher = torch.randn(2, 2, 3, *shape, dtype=torch.float64)
    terms, weights = [((student - teacher) ** 2).mean()], [1.0]
    for size in sizes:
        terms.append(((pooled(student, size) - pooled(teacher, size)) ** 2).mean())
        weights.append(weights[-1] / 2)
    expected = sum(w * t for w, t in zip(weights, terms, strict=True)) / sum(weights)
    torch.testing.assert_close(pyramid_distance(student, teacher), expected)


def test_pyramid_distance_vanishes_at_equality_and_has_the_right_gradient():
    student, teacher = torch.randn(2, 1, 2, 5, 5, dtype=torch.float64)
    assert pyramid_distance(teacher, teacher) == 0
    torch.autograd.gradcheck(lambda z: pyramid_distance(z, teacher), student.requires_grad_())


def test_pyramid_distance_is_wide_and_refuses_other_shapes():
    half = torch.randn(1, 2, 5, 5).bfloat16()
    assert pyramid_distance(half, half).dtype == torch.float32
    with pytest.raises(ValueError, match=r"differ in shape: \(1, 2, 5, 5\), \(1, 2, 4, 5\)"):
        pyramid_distance(half, half[:, :, 1:])


def test_a_fusion_mixes_by_its_attention():
    fusion = AttentionFusion(3, 4, 5, fuse=True).double().eval()
    student = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    deeper = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    result, passed = fusion(student, deeper)
    assert result.shape == (2, 5, 6, 8)
    weight = fusion.reduce[0].weight[:, :, 0, 0]
    norm = fusion.reduce[1]  # fresh: mean 0, variance 1
    reduced = torch.einsum("oc,nchw->nohw", weight, student) / (1 + norm.eps) ** 0.5
    larger = deeper.repeat_interleave(2, -1).repeat_interleave(2, -2)
    both = torch.cat([reduced, larger], 1)
    mix = torch.sigmoid(
        torch.einsum("oc,nchw->nohw", fusion.attention.weight[:, :, 0, 0], both) + fusion.attention.bias[:, None, None]
    )
    torch.testing.assert_close(passed, mix[:, :1] * reduced + mix[:, 1:] * larger)


def test_the_chain_goes_from_deep_to_shallow():
    """A change of the deepest map reaches all results, a change of the shallowest one only its own."""
    fusion = ReviewFusion(3, 2, 5, 4).double().eval()
    maps = [torch.randn(1, 2, side, side, dtype=torch.float64) for side in (8, 4, 2)]
    before = fusion(maps)
    assert [tuple(m.shape) for m in before] == [(1, 5, 8, 8), (1, 5, 4, 4), (1, 5, 2, 2)]
    for level, reached in ((0, {0}), (1, {0, 1}), (2, {0, 1, 2})):
        changed = [m + (n == level) for n, m in enumerate(maps)]
        after = fusion(changed)
        assert {n for n in range(3) if not torch.equal(before[n], after[n])} == reached


def test_review_distance_sums_the_levels_by_name():
    student = {name: torch.randn(1, 2, 4, 4, dtype=torch.float64) for name in "ab"}
    teacher = {name: torch.randn(1, 2, 4, 4, dtype=torch.float64) for name in "ba"}
    expected = sum(pyramid_distance(student[name], teacher[name]) for name in "ab")
    torch.testing.assert_close(review_distance(student, teacher), expected)
