"""The exam's thresholds, all of them.

They were chosen on half of the teachers of known kind of `python -m benchmarks.miniature.exam`, and its other half
shows what they get wrong. Whether they hold for a published model has not been measured: those that can stop a run are
therefore low. Photographs that were blurred, zoomed, shifted and exchanged by hand agree with those of sharpness and
alignment.
"""

# Leads: which part of the base's distance from the picture the teacher saves. Good teachers of the miniature lead by
# 0.33 to 0.52 among patches; those that ignore their picture or saw another object by -0.17 to 0.14.
TAUGHT = 0.2
# A run is stopped only if the lead is below this, plus two standard errors of the mean over the rows.
NO_LEAD = 0.05
STANDARD_ERRORS = 2.0
# The least standard deviation of a row's lead that is believed, and the one that is assumed of a single row.
LEAST_DEVIATION, SINGLE_DEVIATION = 0.03, 0.25
# Or if the teacher draws what the base draws: their distance over the base's from the picture. The miniature's good
# teachers have 0.6 to 0.8, those that ignore their picture 0.01 to 0.24.
UNCHANGED = 0.3

# Sharpness over that of the base or of the picture, whichever is softer. Good teachers: 0.94 to 1.05; blurred by a
# Gaussian of one pixel: 0.53 to 0.76, photographs 0.47.
SHARP = 0.78

# Normalised cross-correlation of two aligned pictures. Pictures of other objects reach 0.3, photographs of other
# scenes 0.35, two photographs of one dog in one pose 0.5; a zoomed or shifted copy has about 0.9 or more.
ALIGNED = 0.6
# Scale and shift that are not drawn by accident: the search is exact to about 0.01.
ZOOMED = 1.04
SHIFTED = 0.03  # of the picture's side
COPY_SHIFT = 0.05  # of the picture's side: the largest shift of a copy
# For an editor: correlation of a drawing that nearly is the result, and share of the result's background. Good
# teachers of the miniature's editor, 96 rows: 0.86 to 0.96, all of the background. With a suffix that does not name
# the last picture 0.65 to 0.95; with another pair's result 0.14 to 0.90, and hardly any background.
EDITED, BACKGROUND_KEPT = 0.8, 0.9
# Share of the rows that must agree before a copy, a zoom or a shift is spoken of.
MOST_ROWS = 0.75

# Colours, from -1 to 1: Euclidean distance up to which two smoothed pixels are the same background. The miniature's
# backgrounds are 0.32 or more apart.
SAME_COLOUR = 0.25
# Share of the border that must have one colour, and shares of the picture that the background may have.
PLAIN_BORDER = 0.75
LEAST_BACKGROUND, MOST_BACKGROUND = 0.2, 0.95
# If the base shows more of the background than this, there is nothing left to copy.
BACKGROUND_GIVEN = 0.95
