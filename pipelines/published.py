"""Facts about the published checkpoints. Imports nothing, so that a script can show its flags at once."""

# Required on derivatives by the FLUX Non-Commercial License.
NON_COMMERCIAL_NOTICE = (
    "> This FLUX Model is licensed by Black Forest Labs Inc. under the FLUX Non-Commercial License. Copyright Black "
    "Forest Labs Inc. IN NO EVENT SHALL BLACK FOREST LABS INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, "
    "WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH USE OF THIS "
    "MODEL."
)
