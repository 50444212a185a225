"""Retrieval metrics as a textbook has them: one query after the other, one image after the other"""


def textbook(distances, query_pids, gallery_pids, query_camids, gallery_camids, camera_rule='exclude'):
    """For each query the rank of the first right answer, or 0, average precision and inverse penalty, or None."""
    found = []
    for row, pid, camid in zip(distances.tolist(), query_pids.tolist(), query_camids.tolist(), strict=True):
        images = []
        for place, (distance, other, camera) in enumerate(
                zip(row, gallery_pids.tolist(), gallery_camids.tolist(), strict=True)):
            if camera_rule == 'exclude' and other == pid and camera == camid:
                continue
            images.append((distance, place, other == pid))
        images.sort()
        right, first, precisions, last = 0, 0, [], 0
        for rank, (_, _, good) in enumerate(images, 1):
            if good:
                right += 1
                precisions.append(right / rank)
                first = first or rank
                last = rank
        found.append((first, sum(precisions) / right, right / last) if right else (0, None, None))
    return found
