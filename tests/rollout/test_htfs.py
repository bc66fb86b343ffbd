"""HTFS against a plain reference implementation of its formulas and fall-backs, on scripted answers of a model."""

from collections import Counter
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.episodes import DataError, Episode
from rollout.htfs import HTFS, HTFSConfig, key_segment
from rollout.htfs_answers import read_intervals, read_percents
from rollout.htfs_vllm import read_images, size_within


def episode(num_frames, fps=8.0, name="e", query="the red circle"):
    return Episode(name, "test", "test", name, name, 48, 64, num_frames, fps, query, None, (), ())


class Script:
    """Answers the looks of each episode in turn from a list, and remembers what it was asked, call by call."""

    def __init__(self, answers):
        self.answers, self.calls, self.number = answers, [], Counter()

    def __call__(self, looks):
        self.calls.append(list(looks))
        replies = []
        for look in looks:
            replies.append(self.answers[look.episode_id][self.number[look.episode_id]])
            self.number[look.episode_id] += 1
            assert len(replies[-1]) == len(look.seeds) == len(set(look.seeds))
        return replies


def sample_one(video, config, answers):
    script = Script({video.episode_id: answers})
    (sample,) = HTFS(config, script, "a model").sample([video])
    return sample, script


# ---- the formulas, plainly ----


def reference(T, fps, config, interval_answers, position_answer):
    """(segment, target frame, fall-backs, looks) from structured answers. An interval answer is a list of (start, end, unit): all that a
    reply holds; a position answer a list of (percent, written as a fraction)."""
    count = Counter()
    first, length, look = 0, T, 0
    while length > 1 and Fraction(length, T) > Fraction(str(config.delta)):
        if look == 1 + config.rounds:
            count["rounds_used_up"] += 1
            break
        starts, ends = [], []
        for reply in interval_answers[look]:
            if not reply:
                count["interval_unread"] += 1
                continue
            if len(set(reply)) > 1:
                count["interval_several"] += 1
            start, end, unit = reply[-1]
            places = []
            for number in (start, end):
                scale = {"seconds": Fraction(fps), "percent": Fraction(length, 100), "frames": Fraction(1)}[unit]
                places.append(Fraction(number) * scale + (first if unit == "percent" else 0))
            if places[0] > places[1]:
                count["interval_reversed"] += 1
                places.reverse()
            if places[1] + Fraction(1, 2) < first or places[0] - Fraction(1, 2) > first + length:
                count["interval_outside"] += 1
                continue
            if places[0] + Fraction(1, 2) < first or places[1] - Fraction(1, 2) > first + length:
                count["interval_clipped"] += 1
            places = [sorted((Fraction(first), p, Fraction(first + length)))[1] for p in places]
            starts.append(places[0])
            ends.append(places[1])
        if starts:
            mean_start, mean_end = sum(starts) / len(starts), sum(ends) / len(ends)
            new_first = min(ceil(mean_start - Fraction(1, 2) if (mean_start % 1) != Fraction(1, 2) else mean_start), first + length - 1)
            new_last = min(ceil(mean_end - Fraction(1, 2) if (mean_end % 1) != Fraction(1, 2) else mean_end), first + length - 1)
            if (new_first, new_last - new_first + 1) == (first, length):
                count["not_shrunk"] += 1
            first, length = new_first, new_last - new_first + 1
        else:
            count["no_interval"] += 1
        look += 1
    p_bar = Fraction(1, 2)
    if length > 1:
        look += 1
        percents = []
        for reply in position_answer:
            if not reply:
                count["position_unread"] += 1
                continue
            if len(set(reply)) > 1:
                count["position_several"] += 1
            percent, as_fraction = reply[-1]
            if as_fraction:
                count["position_fraction"] += 1
            percent = Fraction(percent)
            if percent < 0 or percent > 100:
                count["position_clipped"] += 1
            percents.append(sorted((Fraction(0), percent, Fraction(100)))[1])
        if percents:
            p_bar = sum(percents) / len(percents) / 100
        else:
            count["no_position"] += 1
    target = first + floor(length * p_bar)
    return (first, first + length), min(target, first + length - 1), count, look


def decimals(low, high):
    return st.decimals(low, high, places=2, allow_nan=False).map(lambda d: format(d, "f"))


@st.composite
def scripts(draw):
    T = draw(st.one_of(st.integers(1, 12), st.integers(13, 400), st.just(108_000)))
    fps = draw(st.sampled_from([1.0, 8.0, 23.976, 29.97, 30.0]))
    K, M, rounds = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 3))
    config = HTFSConfig(
        intervals=K, positions=M, rounds=rounds, delta=draw(st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.9])), unit=draw(st.sampled_from(["seconds", "percent", "frames"])),
        look_frames=draw(st.integers(1, 40)),
    )  # fmt: skip
    longest = {"seconds": T / fps, "percent": 100, "frames": T}

    def interval():
        unit = draw(st.sampled_from(["seconds", "percent", "frames"]))
        high = ceil(longest[unit])
        # Mostly inside, now and then beyond; often close together, so that segments shrink.
        a = draw(decimals(-high // 5 if draw(st.booleans()) else 0, ceil(high * 1.3)))
        b = draw(st.one_of(decimals(0, ceil(high * 1.3)), st.just(a)))
        return a, b, unit

    def interval_reply():
        held = [interval() for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2])))]
        if not held:
            return [], draw(st.sampled_from(["", "I cannot tell.", "the 3rd part", '{"start": null, "end": null}', "start: soon, end: 12345678901"]))
        form, texts = draw(st.sampled_from(["json", "text", "prose"])), []
        for a, b, unit in held:
            say = {"seconds": "{}s", "percent": "{}%", "frames": "frame {}"}[unit]
            if unit == config.unit and draw(st.booleans()):
                say = "{}"
            a, b = say.format(a), say.format(b)
            texts.append({"json": f'{{"start": "{a}", "end": "{b}"}}', "text": f"Start = {a}; End = {b}", "prose": f"from {a} to {b}."}[form])
        return held, " or rather ".join(texts)

    def position_reply():
        held, texts = [], []
        for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
            as_fraction = draw(st.integers(0, 4)) == 0
            number = draw(decimals("0.01", "0.99")) if as_fraction else draw(decimals(-20, 130))
            if not as_fraction and 0 < Fraction(number) < 1:
                number = "1"
            held.append((str(Fraction(number) * 100) if as_fraction else number, as_fraction))
            texts.append(f'{{"percent": {number}}}')
        return (held, "then ".join(texts)) if held else ([], draw(st.sampled_from(["", "in the middle", '{"percent": "?"}', "frame"])))

    return T, fps, config, [[interval_reply() for _ in range(K)] for _ in range(rounds + 1)], [position_reply() for _ in range(M)]


@settings(max_examples=150, deadline=None)
@given(scripts())
def test_htfs_is_what_the_formulas_say(script):
    T, fps, config, interval_replies, position_replies = script
    held = [[reply for reply, _ in look] for look in interval_replies]
    segment, target, count, looks = reference(T, fps, config, held, [reply for reply, _ in position_replies])
    intervals_asked = looks - (segment[1] - segment[0] > 1)
    answers = [[text for _, text in look] for look in interval_replies[:intervals_asked]] + [[text for _, text in position_replies]]
    sample, asked = sample_one(episode(T, fps), config, answers)
    assert (sample.segment, sample.target_frame, dict(sample.fallbacks)) == (segment, target, dict(count))
    assert sample.replies == tuple(map(tuple, answers[:looks])) and len(asked.calls) == looks
    assert 0 <= segment[0] <= sample.target_frame < segment[1] <= T
    for (look,) in asked.calls:
        assert 1 <= len(look.frame_ids) <= config.look_frames and list(look.frame_ids) == sorted(set(look.frame_ids))
        assert 0 <= look.frame_ids[0] and look.frame_ids[-1] < T and "the red circle" in look.question


# ---- by hand ----


def test_an_example_by_hand():
    """100 frames at 10 a second, K = M = 2, delta = 0.3. First look: means 2.0 s and 5.9 s, frames 20 to 59, T_key = 40 > 30. Compression:
    means 3.0 s and 4.9 s, frames 30 to 49, T_key = 20. Positions: mean 29.5% of 20 frames, floor(5.9) = 5: frame 35."""
    config = HTFSConfig(intervals=2, positions=2, look_frames=5)
    answers = [
        ['{"start": 1.5, "end": 5.8}', '{"start": 2.5, "end": 6.0}'],
        ['{"start": 3, "end": 5}', '{"start": 3, "end": 4.8}'],
        ['{"percent": 29}', '{"percent": 30}'],
    ]
    sample, script = sample_one(episode(100, 10.0), config, answers)
    assert (sample.segment, sample.target_frame, sample.fallbacks) == ((30, 50), 35, {})
    assert sample.key_frames == (30, 36, 43, 49) and sample.reference_frames == (0, 26, 73, 99)  # of the 80 others the 0th, 26th, 53rd, 79th
    first, second, third = (look for (look,) in script.calls)
    assert first.frame_ids == (0, 25, 50, 74, 99) and first.labels == ("0.00s", "2.50s", "5.00s", "7.40s", "9.90s")
    assert second.frame_ids == (20, 30, 40, 49, 59) and "between 2.00s and 5.90s" in second.question
    assert third.frame_ids == (30, 35, 40, 44, 49) and third.labels == ("0.0%", "25.0%", "50.0%", "70.0%", "95.0%")


def test_a_share_is_floored_exactly():
    """100 frames, 29%: 100 * 0.29 is 28.999… in floating point."""
    answers = [['{"start": 0, "end": 99}']] * 2 + [['{"percent": 29}']]
    sample, _ = sample_one(episode(100, 1.0), HTFSConfig(intervals=1, positions=1, rounds=1), answers)
    assert sample.target_frame == 29 and sample.fallbacks == {"not_shrunk": 2, "rounds_used_up": 1}


def test_a_segment_of_exactly_delta_is_short_enough():
    """Three of ten frames: in floating point 0.3 is a little less than three tenths, and the segment would be compressed."""
    sample, script = sample_one(episode(10, 1.0), HTFSConfig(intervals=1, positions=1, delta=0.3), [['{"start": 4, "end": 6}'], ["0%"]])
    assert (sample.segment, sample.target_frame, sample.fallbacks, len(script.calls)) == ((4, 7), 4, {}, 2)


@pytest.mark.parametrize(
    "unit, reply, segment, labels",
    [
        ("percent", '{"start": 25, "end": 50}', (10, 21), ("0.0%", "97.5%")),
        ("frames", "frames 10 to 20", (10, 21), ("frame 0", "frame 39")),
        ("seconds", '{"start": "0:01.25", "end": "2.5 seconds"}', (10, 21), ("0.00s", "4.88s")),
    ],
)
def test_units(unit, reply, segment, labels):
    sample, script = sample_one(episode(40, 8.0), HTFSConfig(intervals=1, positions=1, look_frames=2, unit=unit, delta=0.9), [[reply], ["50%"]])
    assert sample.segment == segment and script.calls[0][0].labels == labels


@pytest.mark.parametrize(
    "reply, segment, fallbacks",
    [
        ("9.5 to 9.6", (10, 11), {}),
        ("9 to 9.4", (10, 20), {"interval_outside": 1, "no_interval": 1}),
        ("9.4 to 11", (10, 12), {"interval_clipped": 1}),
        ("20.4 to 20.5", (19, 20), {}),
        ("20.6 to 21", (10, 20), {"interval_outside": 1, "no_interval": 1}),
        ("18 to 20.6", (18, 20), {"interval_clipped": 1}),
    ],
)
def test_half_a_frame_beyond_is_not_beyond(reply, segment, fallbacks):
    count = Counter()
    assert key_segment([reply], (10, 20), 1.0, "frames", count) == segment and count == fallbacks


def test_the_same_interval_with_and_without_its_unit_is_no_contradiction():
    reply = '{"start": "0.00s", "end": "2.00s"} or rather {"start": "0.00", "end": "2.00"}'
    for unit, several in (("seconds", 0), ("frames", 1)):
        fallbacks = Counter()
        assert key_segment([reply], (0, 40), 8.0, unit, fallbacks) == ((0, 17) if unit == "seconds" else (0, 3))
        assert fallbacks["interval_several"] == several


def test_episodes_go_on_together_and_do_not_touch_each_other():
    config = HTFSConfig(intervals=1, positions=1)
    answers = {
        "short": [["nothing"], ['{"start": 0, "end": 0}']],
        "one": [],
        "long": [['{"start": 0, "end": 50}'], ['{"start": 0, "end": 20}'], ["7%"]],
    }
    videos = [episode(3, 1.0, "short"), episode(1, 1.0, "one"), episode(100, 1.0, "long")]
    script = Script(answers)
    samples = HTFS(config, script, "a model").sample(videos)
    assert [[look.episode_id for look in call] for call in script.calls] == [["short", "long"], ["short", "long"], ["long"]]
    assert [s.target_frame for s in samples] == [0, 0, 1] and samples[0].fallbacks == {"interval_unread": 1, "no_interval": 1}
    for video, sample in zip(videos, samples, strict=True):
        assert sample_one(video, config, answers[video.episode_id])[0] == sample
    assert HTFS(config, script, "a model").sample([]) == []


def test_every_look_draws_its_replies_with_seeds_of_its_own():
    def seeds(name, seed):
        script = Script({name: [["no"] * 5, ["no"] * 5, ["no"] * 5]})
        HTFS(HTFSConfig(rounds=1), script, "a model", seed=seed).sample([episode(20, name=name)])
        return [s for (look,) in script.calls for s in look.seeds]

    drawn = seeds("a", 0) + seeds("b", 0) + seeds("a", 1)
    assert len(set(drawn)) == len(drawn) == 45 and seeds("a", 0) == drawn[:15] and all(0 <= s < 2**63 for s in drawn)


def test_a_video_without_a_rate_is_refused():
    with pytest.raises(DataError, match="episode e: fps is 0"):
        HTFS(HTFSConfig(), Script({}), "a model").sample([episode(10, 0.0)])


def test_a_template_with_a_wrong_name_is_refused():
    with pytest.raises(ValueError, match="htfs.position_question: not a template"):
        HTFSConfig(position_question="Where is {target}?")


# ---- reading replies ----


@pytest.mark.parametrize(
    "reply, expected",
    [
        ('{"start": 3.2, "end": 7.5}', [("3.2", None, "7.5", None)]),
        ('```json\n{"start_time": "3.2s",\n "end_time": "70%"}\n```', [("3.2", "seconds", "70", "percent")]),
        ("It goes from 1 to 9. Start: 3, End: 5", [("3", None, "5", None)]),  # start and end count for more than prose
        ("about 20-50%", [("20", "percent", "50", "percent")]),
        ("between 3 sec and 5", [("3", "seconds", "5", "seconds")]),
        ("0:05 – 1:02:03.5", [("5", "seconds", "3723.5", "seconds")]),
        ("[3, 4.5]", [("3", None, "4.5", None)]),
        ('{"start": 1, "end": 2} no, {"start": 2, "end": 3}, yes {"start": 1, "end": 2}', [("2", None, "3", None), ("1", None, "2", None)]),
        ('{"start": -1, "end": 99}', [("-1", None, "99", None)]),
        ("[1, 2, 3]", []),
        ("12345678901 to 5", []),
        ("v1.2.3 to 4", []),
        ("", []),
    ],
)
def test_intervals_are_read(reply, expected):
    assert [(a.value, a.unit, b.value, b.unit) for a, b in read_intervals(reply)] == [(Fraction(a), u, Fraction(b), v) for a, u, b, v in expected]


@pytest.mark.parametrize(
    "reply, expected",
    [
        ('{"percent": 40}', [("40", False)]),
        ('{"percentage": "40.5%"}', [("40.5", False)]),
        ("first 30 percent, then 50%", [("30", False), ("50", False)]),
        ("At 10% it appears. position: 60", [("60", False)]),
        (" 40. ", [("40", False)]),
        ("0.4", [("40", True)]),
        ("0.4%", [("0.4", False)]),
        ("1.0", [("1", False)]),
        ("-5", [("-5", False)]),
        ("frame 12", []),
        ("", []),
    ],
)
def test_percentages_are_read(reply, expected):
    assert read_percents(reply) == [(Fraction(p), f) for p, f in expected]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='0123456789.:-%s "{}[],framestdpo', max_size=200))
def test_any_reply_can_be_read(reply):
    read_intervals(reply), read_percents(reply)


# ---- long videos ----


def test_an_hour_of_video_is_looked_at_through_few_frames(monkeypatch):
    """An hour at 30 frames a second: three looks read 32 frames each, and only those are there to be decoded."""
    read = []

    def synthetic_frames(video, frame_ids):
        read.extend(frame_ids)
        return {t: np.full((36, 64, 3), t % 256, np.uint8) for t in frame_ids}

    monkeypatch.setattr("rollout.htfs_vllm.read_frames", synthetic_frames)
    script = Script({"e": [['{"start": 1200, "end": 2400}'] * 5, ['{"start": 1500, "end": 1560}'] * 5, ["50%"] * 5]})

    def ask(looks):
        for look in looks:
            images = read_images(look, 1024, 4)
            assert [image[0, 0, 0] for image in images] == [t % 256 for t in look.frame_ids] and images[0].shape == (24, 40, 3)
        return script(looks)

    (sample,) = HTFS(HTFSConfig(delta=0.2), ask, "a model").sample([episode(108_000, 30.0)])
    assert sample.segment == (45_000, 46_801) and sample.target_frame == 45_900
    assert len(read) == 96 and (read[32], read[63], read[64], read[95]) == (36_000, 72_000, 45_000, 46_800)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(784, 10**6), st.sampled_from([28, 32]))
def test_frames_are_shown_at_a_size_of_whole_tokens(height, width, max_pixels, step):
    h, w = size_within((height, width), max_pixels, step)
    assert h % step == w % step == 0 and h <= max(height, step) and w <= max(width, step)
    assert h * w <= max_pixels or step in (h, w)
