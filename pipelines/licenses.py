"""Licences of the published checkpoints, for the model card."""

from dopsd.model_card import License


# Required on derivatives by the FLUX Non-Commercial License.
NON_COMMERCIAL_NOTICE = (
    "> This FLUX Model is licensed by Black Forest Labs Inc. under the FLUX Non-Commercial License. Copyright Black "
    "Forest Labs Inc. IN NO EVENT SHALL BLACK FOREST LABS INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, "
    "WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH USE OF THIS "
    "MODEL."
)

FLUX2_KLEIN_LICENSES = (
    License(r"black-forest-labs/FLUX\.2-klein-(base-)?4B\b.*", title="Apache-2.0", id="apache-2.0"),
    License(
        r"black-forest-labs/FLUX\.2-klein-(base-)?9B\b.*",
        title="FLUX Non-Commercial License",
        id="other",
        name="flux-non-commercial-license",
        file="LICENSE.md",
        notice=NON_COMMERCIAL_NOTICE,
    ),
)
