# Versions and places of the tools that the suites drive; sourced by the scripts of this folder.
CRI_TOOLS_VERSION=1.36.0
CONTAINERD_VERSION=2.4.2
RUNC_VERSION=1.5.2
IMAGES_VERSION=1 # raise when mkimages changes what an image holds

BERTH_TOOLS=${BERTH_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/berth-tools}
IMAGES=$BERTH_TOOLS/images-$IMAGES_VERSION
CRI_TOOLS=$BERTH_TOOLS/cri-tools-$CRI_TOOLS_VERSION-images-$IMAGES_VERSION # critest knows a digest of the images
CONTAINERD=$BERTH_TOOLS/containerd-$CONTAINERD_VERSION
RUNC=$BERTH_TOOLS/runc-$RUNC_VERSION
export BERTH_TOOLS
