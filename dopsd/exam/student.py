"""How far the student has come: which part of the teacher's lead it has, and whether it zooms or blurs."""

from statistics import mean

from .figures import Figures
from .results import Exam, average_motion, ratio
from .thresholds import NO_LEAD, STANDARD_ERRORS
from .verdict import percent


PROGRESS, SHARPNESS, ZOOM = "progress", "student/sharpness", "student/zoom"


def progress(exam: Exam, students: list[Figures]) -> dict[str, float]:
    """Percentages, 0 for the base and 100 for the teacher; a student may be beyond either.

    Args:
        students: of the student's drawing for each row of the exam, from the same noise.

    Returns:
        "progress/MEASURE" for each measure of closeness in which the teacher surely has a lead, and "progress" for the
        one with the largest lead among those that tell whether it has the subject, if there is one.
    """
    found, leads = {}, exam.leads
    for name, lead in leads.items():
        if lead.value >= max(NO_LEAD, STANDARD_ERRORS * lead.error) and name in students[0].distances:
            base, teacher = (mean(exam.distances(who, name)) for who in ("base", "teacher"))
            student = mean(figures.distances[name] for figures in students)
            found[f"{PROGRESS}/{name}"] = 100 * (base - student) / (base - teacher)
    deciding = [name for name in exam.deciding_leads if f"{PROGRESS}/{name}" in found]
    if not deciding:
        return found
    headline = max(deciding, key=lambda name: leads[name].value)
    return {PROGRESS: found[f"{PROGRESS}/{headline}"]} | found


def student_figures(exam: Exam, students: list[Figures]) -> dict[str, float]:
    """`progress`, the student's sharpness over the base's, and its zoom if its drawings align with the pictures."""
    base = mean(row.base.sharpness for row in exam.rows)
    motion = average_motion(students)
    return {
        **progress(exam, students),
        SHARPNESS: ratio(mean(figures.sharpness for figures in students), base),
        **({} if motion is None else {ZOOM: motion.scale}),
    }


def in_words(figures: dict[str, float], *, from_lora: bool = False) -> str:
    """Such as "Progress: 43 % of the teacher's lead, sharpness 98 % of the base's, zoom x1.02."."""
    whose, parts = "the student's before training" if from_lora else "the base's", []
    if PROGRESS in figures:
        parts.append(f"Progress: {percent(figures[PROGRESS] / 100)} of the teacher's lead")
    parts.append(f"sharpness {percent(figures[SHARPNESS])} of {whose}")
    if ZOOM in figures:
        parts.append(f"zoom x{figures[ZOOM]:.2f}")
    sentence = ", ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."
