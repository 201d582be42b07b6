"""The exam's verdict in words, the flags that help, and whether a run should stop."""

from dataclasses import dataclass
from math import log

from .figures import ANYWHERE, IN_PLACE, MEASURES
from .results import Exam, Motion, apart, is_copy
from .thresholds import BACKGROUND_KEPT, EDITED, NO_LEAD, SHARP, SHIFTED, TAUGHT, UNCHANGED, ZOOMED


ZOOMS, BLURS, MISSES = "zooms", "blurs", "misses the result"
NO_BETTER, NO_FURTHER = "no better than the base", "no better than the student before training"
COPIES, TEACHES, EDITS = "copies the whole picture", "teaches the subject", "teaches the edit"
VERDICTS = (TEACHES, EDITS, COPIES, NO_BETTER, NO_FURTHER, MISSES, BLURS, ZOOMS)

IGNORE_FLAG = "--ignore_exam"


@dataclass(frozen=True)
class Finding:
    """One of `VERDICTS`, the figure that it rests on, and what to do about it."""

    verdict: str
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.verdict} ({self.reason}); {self.advice}"


def findings(exam: Exam) -> list[Finding]:
    """All that was found, the most serious first: its verdict is the exam's. There is at least one."""
    found = [zoom(exam), blur(exam), copy(exam), no_lead(exam), miss(exam)]
    return [finding for finding in found if finding is not None] or [success(exam)]


def verdict(exam: Exam) -> str:
    return findings(exam)[0].verdict


def stop_line(exam: Exam, teacher: str) -> str | None:
    """Why the run should not start, in one line; None if it may, or if the figures do not tell.

    Args:
        teacher: its flag and value, such as "--teacher_context edit".
    """
    finding = no_lead(exam)
    if finding is None or not is_surely_no_better(exam):
        return None
    return (
        f"{teacher}: the teacher is {finding.verdict} ({finding.reason}; see preview.png), so training would teach "
        f"nothing: {finding.advice}; or pass {IGNORE_FLAG} to train all the same"
    )


def is_surely_no_better(exam: Exam) -> bool:
    """Whether the teacher has no lead beyond doubt: it draws what the base draws, or no measure sees a lead.

    A teacher that sees no picture is stopped for the first only: a caption does not promise the picture. So is one
    that sees it through a vision tower, if there are latents only: it need not draw the picture's patches. One that
    copies the picture that it saw, even if that is another than the training picture, is not stopped.
    """
    if shows_what_it_saw(exam):
        return False
    leads = exam.deciding_leads.values()
    if exam.change < UNCHANGED and all(lead.value < NO_LEAD for lead in leads):
        return True
    is_judged = exam.saw_picture and not (exam.saw_by_tower and {*exam.measures} <= {IN_PLACE, ANYWHERE})
    return is_judged and all(lead.at_most < NO_LEAD for lead in leads)


def shows_what_it_saw(exam: Exam) -> bool:
    """Whether it copies that picture, as it is or zoomed or shifted."""
    return copy(exam) is not None or zoom(exam) is not None


def best_lead(exam: Exam) -> float:
    return max(lead.value for lead in exam.deciding_leads.values())


def leads_in_words(exam: Exam) -> str:
    """Such as "3 % closer to the pictures than the base by latents anywhere", of the best measure."""
    leads = exam.deciding_leads
    best = max(leads, key=lambda name: leads[name].value)
    value = leads[best].value
    if abs(value) < 0.005:
        how = "no closer to the pictures"
    else:
        how = f"{percent(abs(value))} {'closer to' if value > 0 else 'further from'} the pictures"
    return f"{how} than {exam.reference} by {MEASURES[best]}"


def percent(share: float) -> str:
    return f"{round(100 * share)} %"


# What can be found


def no_lead(exam: Exam) -> Finding | None:
    if best_lead(exam) >= TAUGHT or shows_what_it_saw(exam):
        return None
    if exam.change < UNCHANGED:
        reason = f"it draws what {exam.reference} draws"
    else:
        reason = leads_in_words(exam)
    advice = advice_for_no_lead(exam)
    if not is_surely_no_better(exam):
        more = "" if exam.exam_model else ", or pass --exam_model, which compares subjects better,"
        advice = f"too close for certainty: look at preview.png{more} before you {advice}"
    return Finding(NO_FURTHER if exam.from_lora else NO_BETTER, reason, advice)


def advice_for_no_lead(exam: Exam) -> str:
    if not exam.saw_picture:
        return "make the teacher's captions say more"
    pictures = ", or --group_column, if it saw another subject" if exam.saw_other else ""
    return f"change --teacher_prompt_suffix or --teacher_context{pictures}, or check captions and pictures"


def blur(exam: Exam) -> Finding | None:
    if exam.sharpness_kept >= SHARP:
        return None
    return Finding(
        BLURS,
        f"{percent(exam.sharpness_kept)} of the sharpness of {exam.reference} and the pictures",
        "draw at the model's own --num_inference_steps, give larger pictures or a higher --teacher_resolution, and "
        "check --init_lora",
    )


def zoom(exam: Exam) -> Finding | None:
    """A zoom that most rows share, or nearly the same shift in most rows, that the base does not have."""
    teacher, base = exam.motion("teacher"), exam.motion("base")
    if teacher is None:
        return None
    reasons = []
    if all_zoom(exam, teacher) and not (base and abs(log(base.scale / teacher.scale)) < log(ZOOMED)):
        reasons.append(f"x{teacher.scale:.2f}")
    if all_shift(exam, teacher) and not (base and apart(base, teacher) < SHIFTED):
        reasons.append(f"shifts by {percent(teacher.right)} to the right and {percent(teacher.down)} down")
    if not reasons:
        return None
    return Finding(
        ZOOMS,
        ", ".join(reasons),
        "give the teacher pictures of the training size (no --teacher_resolution), with --cond_image_column sources "
        "and results of one shape",
    )


def all_zoom(exam: Exam, motion: Motion) -> bool:
    """Whether most rows are zoomed, in the same direction."""
    scales = [row.alignment.scale for row in exam.figures("teacher") if row.alignment.is_found]
    zoomed = [scale > ZOOMED if motion.scale > 1 else scale < 1 / ZOOMED for scale in scales]
    return sum(zoomed) >= exam.most_rows


def all_shift(exam: Exam, motion: Motion) -> bool:
    """Whether most rows, and more than two, are shifted by the same: a subject that is drawn elsewhere is not."""
    is_moved = max(abs(motion.right), abs(motion.down)) > SHIFTED
    moved = [row.alignment for row in exam.figures("teacher") if row.alignment.is_found]
    alike = [one for one in moved if apart(one, motion) < SHIFTED]
    return is_moved and len(alike) >= max(3, exam.most_rows)


def copy(exam: Exam) -> Finding | None:
    """Most drawings show the picture in its place, and more of them than the base's."""
    copies, by_base = (sum(map(is_copy, exam.figures(who))) for who in ("teacher", "base"))
    if exam.is_editor or copies < exam.most_rows or copies <= by_base:
        return None
    background = exam.copied_background
    also = "" if background is None else f", {percent(background)} of the background that the caption does not give"
    return Finding(
        COPIES,
        f"{copies} of {len(exam.rows)} in the same place{also}",
        "right for a style or a whole scene; for a person, a pet or an object take a --teacher_prompt_suffix that "
        "asks for the subject only",
    )


def miss(exam: Exam) -> Finding | None:
    """An editor's teacher sees the result, so it should nearly draw it, with its background, in place."""
    if not exam.is_editor or zoom(exam) is not None:
        return None
    drawings, background = exam.figures("teacher"), exam.kept_background
    near = sum(is_copy(one) and one.alignment.quality >= EDITED for one in drawings)
    reasons = []
    if background is not None and background < BACKGROUND_KEPT:
        reasons.append(f"shows {percent(background)} of the result's background")
    if near < exam.most_rows:
        reasons.append(f"{near} of {len(drawings)} drawings are nearly the result")
    if not reasons:
        return None
    change = "change --teacher_prompt_suffix or --teacher_context" if exam.saw_picture else advice_for_no_lead(exam)
    return Finding(MISSES, ", ".join(reasons), f"look at preview.png; if it draws something else, {change}")


def success(exam: Exam) -> Finding:
    return Finding(EDITS if exam.is_editor else TEACHES, leads_in_words(exam), "go ahead")
