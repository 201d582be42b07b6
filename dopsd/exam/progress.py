"""How far the student has come: which part of the teacher's lead over the base it has."""

from statistics import mean

from .figures import Figures
from .results import Exam
from .thresholds import NO_LEAD


PROGRESS = "progress"


def progress(exam: Exam, students: list[Figures]) -> dict[str, float]:
    """Percentages, 0 for the base and 100 for the teacher; a student may be beyond either.

    Args:
        students: of the student's drawing for each row of the exam, from the same noise.

    Returns:
        "progress/MEASURE" for each measure of closeness in which the teacher has a lead, and "progress" for the one in
        which its lead is the largest. Empty if it leads in none.
    """
    found = {}
    for name, lead in exam.leads.items():
        if lead.value >= NO_LEAD:
            base, teacher = (mean(exam.distances(who, name)) for who in ("base", "teacher"))
            student = mean(figures.distances[name] for figures in students)
            found[f"{PROGRESS}/{name}"] = 100 * (base - student) / (base - teacher)
    headline = found.get(f"{PROGRESS}/{exam.headline}")
    return found if headline is None else {PROGRESS: headline} | found
